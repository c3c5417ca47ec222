"""How a student comes to feed fewer visual tokens: from options, caches and the frozen vision tower to its configuration."""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from vlm_distill_cache.common.attention.sinks import sink_scores
from vlm_distill_cache.common.attention.tiles import Tile, grid_tile
from vlm_distill_cache.common.cache.plan import with_more
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, ModelError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.files.rules import check, items, number, record, text
from vlm_distill_cache.common.files.signed import read_signed, write_signed
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.models.changed import change_model
from vlm_distill_cache.common.models.tokens.fewer_tokens import tower_features
from vlm_distill_cache.common.terminal.launch import enter_launch
from vlm_distill_cache.common.tools.sinks import Part, read_sinks, sinks_of
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.images.encoder import AnyImageEncoder, ImageEncoder
from vlm_distill_cache.data.images.layouts.framed import FramedEncoder
from vlm_distill_cache.data.images.layouts.split import SplitEncoder
from vlm_distill_cache.data.images.layouts.thumbnail import ThumbnailEncoder
from vlm_distill_cache.data.text.generation import device_of
from vlm_distill_cache.data.text.processors import module_fingerprint
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset
from vlm_distill_cache.stage2_student.batches.gaze import GAZE, GazeTerm, fit_gaze
from vlm_distill_cache.stage2_student.batches.united import UnitedDataset
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.pruned_folder import fed_words
from vlm_distill_cache.stage2_student.students.build import read_cache_json
from vlm_distill_cache.stage2_student.students.encoder import knows_boxes
from vlm_distill_cache.stage2_student.students.library import core_of
from vlm_distill_cache.stage2_student.students.model import StudentModel, model_inputs_of

GAZE_FILE = "gaze.json"
FITTED_SAMPLES = 512
_OTHERS = "choose token_selection=attention, grid or random"
_NUMBERS = number(-1e30, 1e30)
_RULE = record({"of": text(100), "weights": items(_NUMBERS, least=1, most=1 << 20), "bias": _NUMBERS})
_log = logging.getLogger(__name__)


def chooses_tokens(config: TrainConfig) -> bool:
    """Whether a run says how many visual tokens its student feeds or attends to."""
    return config.visual_tokens is not None or config.decoding_tokens is not None


def changes_for(config: TrainConfig, *, sinks: list[float] | None = None, gaze: Any = None) -> dict[str, Any]:
    """The changes that a student's configuration says, by name (`common.models.changed`)."""
    changes: dict[str, Any] = {}
    if config.visual_tokens is not None:
        changes["visual_tokens"] = {
            "keep": _number(config.visual_tokens),
            "by": config.token_selection,
            "sink_penalty": config.sink_penalty,
            "sinks": sinks,
            "gaze": gaze,
            "merge_frames": config.merge_frames,
            "seed": config.seed,
        }
    if config.decoding_tokens is not None:
        changes["decoding_tokens"] = {
            "keep": _number(config.decoding_tokens),
            "by": config.decoding_selection,
            "shift_threshold": config.shift_threshold,
            "layers": None,
        }
    return changes


def _number(keep: float) -> float | int:
    return keep if keep < 1 else int(keep)


def check_choice(
    config: TrainConfig, caches: Iterable[TeacherCache], student: StudentModel, encoder: AnyImageEncoder, *, where: str
) -> None:
    """Refuse a choice of visual tokens that a student or its caches cannot serve, before weights are loaded.

    Args:
        student: On any device, none (meta) too; it stays as it is.

    Raises:
        ConfigError, CacheMismatchError, ModelError: With what to choose in its place.
    """
    if not chooses_tokens(config):
        return
    core = core_of(student)
    family = family_of(str(core.config.model_type))
    if not family.is_listed:
        raise ModelError(
            f"{where}: where a model of model_type {core.config.model_type!r} keeps its vision tower and language model is not "
            "known (data/families/table.py), so its visual tokens cannot be chosen; leave visual_tokens and decoding_tokens out"
        )
    if (config.visual_tokens or 0) > encoder.token_count:
        _log.warning(
            "visual_tokens=%d: %s has at most %d for a picture, so that all of them are fed",
            config.visual_tokens, where, encoder.token_count,
        )  # fmt: skip
    if config.follows_gaze:
        _check_gaze(config, caches, encoder, where)
    sinks = None
    if config.visual_tokens is not None and config.token_selection == "sinks":
        tiles, first = _layout_of(encoder, where), next(iter(caches))
        _check_tower_grid(first, core.config, where)
        # Of a cache that is not built yet nothing is known.
        unknown = [0.0] * sum(tile.token_count for tile in tiles)
        sinks = student_sinks(first, encoder, where) if first.manifest_hash else unknown
    with torch.device("meta"):
        shell = type(core)(copy.deepcopy(core.config))
    nothing = {"weights": [0.0], "bias": 0.0} if config.follows_gaze else None
    change_model(shell, family.parts, **changes_for(config, sinks=sinks, gaze=nothing))


def _check_gaze(config: TrainConfig, caches: Iterable[TeacherCache], encoder: AnyImageEncoder, where: str) -> None:
    (signal,) = GazeTerm().reads
    if trained := [name for name in config.phases if config.phase(name).trainable == "tower"]:
        raise ConfigError(
            f"token_selection=gaze expects the teacher's gaze from features of a frozen vision tower, and {trained[0]}.trainable "
            f"is tower; set {trained[0]}.trainable=all, or {_OTHERS}"
        )
    for cache in caches:
        if signal not in cache.plan.signals:
            raise CacheMismatchError(
                f"token_selection=gaze needs a signal that {cache.place} does not hold: {signal}; it holds "
                f"{', '.join(sorted(cache.plan.signals))}. {_OTHERS[0].upper()}{_OTHERS[1:]}, or "
                + with_more(
                    cache.plan,
                    f"build a cache with this signal ({by_make(f'SIGNALS={signal},..., ')}teacher-cache build --signals "
                    f"{signal},...)",
                    options=f"--signals {signal},...",
                )
            )
        for side, described in ((where, encoder.to_dict()), (f"the teacher of {cache.place}", cache.plan.geometry)):
            if not knows_boxes(described):
                raise CacheMismatchError(
                    f"token_selection=gaze: which part of the picture each visual token of {side} sees is not known, so the "
                    f"teacher's gaze cannot fall on them; {_OTHERS}"
                )


def _layout_of(encoder: AnyImageEncoder, where: str) -> tuple[Tile, ...]:
    """The visual tokens that all pictures, or all tiles of pictures, have in a student.

    Raises:
        ConfigError: If there is none.
    """
    fixed = encoder.fixed if isinstance(encoder, FramedEncoder) else encoder
    if not isinstance(fixed, ImageEncoder | SplitEncoder | ThumbnailEncoder):
        raise ConfigError(
            f"token_selection=sinks: {where} arranges visual tokens in other grids for pictures of other sizes "
            f"({type(fixed).__name__}), so that no place is the same one in all, and a cache's sinks are places; choose "
            "token_selection=attention, gaze, grid or random"
        )
    if isinstance(fixed, ImageEncoder):
        return encoder(PIL.Image.new("RGB", (64, 64))).tiles  # of a square picture, without padding
    return (grid_tile(*fixed.grid),)


def _check_tower_grid(cache: TeacherCache, config: Any, where: str) -> None:
    """Refuse the sinks of another grid of patches than that of the student's tower, as far as a cache tells its own."""
    if not (cache.path / "vision_tower.json").exists():
        return
    theirs = read_cache_json(cache.path, "vision_tower.json")
    ours = getattr(config, "vision_config", None)
    sides = [
        (size // patch if isinstance(size, int) and isinstance(patch, int) and patch else None)
        for size, patch in (
            (getattr(ours, "image_size", None), getattr(ours, "patch_size", None)),
            (theirs.get("image_size"), theirs.get("patch_size")),
        )
    ]
    if None not in sides and sides[0] != sides[1]:
        raise CacheMismatchError(
            f"token_selection=sinks: the vision tower of {where} cuts pictures into {sides[0]} x {sides[0]} patches, that of the "
            f"teacher of {cache.place} into {sides[1]} x {sides[1]}: its sinks are other places; choose "
            "token_selection=attention, gaze, grid or random, or a student behind the teacher's tower"
        )


def student_sinks(cache: TeacherCache, encoder: AnyImageEncoder, where: str) -> list[float]:
    """How much of a sink each visual token of a picture, or of one of its tiles, is in a cache, in the order that they are read.

    Those of the teacher's vision tower, where the cache knows them, else of its language model.

    Raises:
        ConfigError: If the student has no places that are the same ones in all pictures.
        CacheMismatchError: If the cache knows no sinks, or none of single tiles for a student that reads several.
    """
    tiles, known = _layout_of(encoder, where), read_sinks(cache)
    part: Part = "tower" if "tower" in known.maps else "language_model"
    found = sinks_of(cache, part, known=known)
    scores = found.on(tiles)
    if isinstance(encoder, SplitEncoder | ThumbnailEncoder) and found.places != "tile":
        # Where all pictures had as many tiles, each tile is a picture more.
        grids = {(tile.rows, tile.cols) for tile in found.tiles}
        if found.places != "token" or grids != {encoder.grid}:
            raise CacheMismatchError(
                f"token_selection=sinks: {where} reads pictures as tiles of {encoder.grid[0]} x {encoder.grid[1]} tokens, and "
                f"{cache.place} knows no sinks of such tiles (but of {found.places}s); choose "
                "token_selection=attention, gaze, grid or random, or give the cache of a teacher with such tiles"
            )
        scores = sink_scores(found.received.reshape(len(found.tiles), -1))
    _log.info("sinks are those of the teacher's %s in %s", part.replace("_", " "), cache.place)
    return [float(f"{score:.6g}") for score in scores]


Joined = CachedDataset | UnitedDataset


def say_fed(config: TrainConfig, encoder: AnyImageEncoder) -> str:
    """How many visual tokens of a picture a run's student feeds; empty where it is all of them, or the number varies."""
    if config.visual_tokens is None:
        return ""
    return fed_words(config.visual_tokens, config.token_selection, encoder.to_dict())


def choose_tokens(
    config: TrainConfig,
    student: StudentModel,
    *,
    cache: TeacherCache | None,
    encoder: AnyImageEncoder,
    dataset: Joined | None,
    where: str,
) -> dict[str, Any] | None:
    """Change a student that has its weights to feed, or attend to, as many visual tokens as a run says.

    Args:
        cache: Whose sinks, or gaze, they are; None where neither chooses.
        encoder: The student's.
        dataset: With `GazeTerm` among its terms; None where the gaze does not choose.
        where: The student, for errors.

    Returns:
        The regression of ``token_selection=gaze``, for a file beside the checkpoints (`save_gaze`); else None.
    """
    if not chooses_tokens(config):
        return None
    if (fed := say_fed(config, encoder)) and enter_launch().rank == 0:
        _log.info("%s %s", where, fed)
    core, sinks, gaze = core_of(student), None, None
    if config.follows_gaze and cache is not None and dataset is not None:
        of = _identity(config, cache)
        gaze = _stored_gaze(Path(config.output) / GAZE_FILE, of)
        if gaze is None:
            _log.info("fitting where the teacher looks on features of the vision tower of %s", where)
            with _on_device(student, config.device):
                gaze = {"of": of, **fit_on_tower(student, dataset, where=where)}
    elif cache is not None and config.visual_tokens is not None and config.token_selection == "sinks":
        sinks = student_sinks(cache, encoder, where)
        tower = core.get_submodule(family_of(core.config.model_type).parts["vision_tower"])
        if cache.plan.fingerprints.get("vision_tower") != module_fingerprint(tower):
            _log.warning(
                "token_selection=sinks: the vision tower of %s is not the teacher's of %s, so that its sinks may be other places",
                where, cache.place,
            )  # fmt: skip
    of_config = None if gaze is None else {name: gaze[name] for name in ("weights", "bias")}
    change_model(core, family_of(core.config.model_type).parts, **changes_for(config, sinks=sinks, gaze=of_config))
    return gaze


@contextmanager
def _on_device(student: StudentModel, device: str) -> Iterator[None]:
    """In the block a student that was just loaded is where it will be trained: a tower of some size takes minutes on a CPU."""
    if device == "cpu" or not torch.cuda.is_available():
        yield
        return
    student.to(device if ":" in device else f"cuda:{enter_launch().local}")
    try:
        yield
    finally:
        student.to("cpu")


def fit_on_tower(
    student: StudentModel, dataset: Joined, *, where: str, samples: int = FITTED_SAMPLES
) -> dict[str, Any]:
    """Fit the teacher's gaze on features of a student's vision tower, of evenly spaced samples.

    Returns:
        As of `fit_gaze`.
    """
    core = core_of(student)
    parts = family_of(core.config.model_type).parts
    places = np.unique(np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).round().astype(np.int64))

    def pictures() -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        for place in places.tolist():
            batch = dataset.batch((place,))
            if GAZE not in batch.targets:
                continue
            gaze = batch.targets[GAZE].scores[0]
            with torch.no_grad():
                inputs = model_inputs_of(student, batch.inputs.to(device_of(student)))
                features = torch.cat(list(tower_features(core, parts, inputs)))  # [N, D]
            real = features.any(dim=1).cpu()  # not the ends of lines, which are no places
            if not gaze.isnan().any():
                yield features.float().cpu()[real].numpy(), gaze.cpu()[real].numpy()

    return fit_gaze(pictures(), where=where)


def _identity(config: TrainConfig, cache: TeacherCache) -> str:
    """Of what a regression is: the student before training, and the cache."""
    names = ("student", "student_weights", "vision_tower", "language_model", "projector", "pool_teacher_tokens", "seed")
    return fingerprint(
        [*(getattr(config, name) for name in names), config.limit, config.data_share, cache.manifest_hash]
    )


def _stored_gaze(path: Path, of: str) -> dict[str, Any] | None:
    """The regression that a run wrote before it was killed; None if there is none of it."""
    try:
        found: dict[str, Any] = check(read_signed(path), _RULE, str(path))
    except (FileNotFoundError, CacheFormatError):
        return None
    return found if found["of"] == of else None


def save_gaze(output: Path, gaze: Mapping[str, Any]) -> None:
    """Keep a run's regression, so that a resumed run has the same one, bit for bit, on another machine too."""
    write_signed(output / GAZE_FILE, {name: gaze[name] for name in ("of", "weights", "bias")})

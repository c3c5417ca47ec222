"""A student cut out of its teacher: by name (``pruned:0.5``), how it is cut, and the folder that it becomes. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vlm_distill_cache.common.cache.document_rules import MAX_SETTINGS_BYTES
from vlm_distill_cache.common.config import SAYS_NOTHING, Word
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.files.signed import CHECKSUM, find_damage, read_signed
from vlm_distill_cache.common.models.tokens.budget import kept_count
from vlm_distill_cache.stage2_student.loss_weights import require

WidthImportance = Literal["activation", "taylor"]
DepthImportance = Literal["influence", "taylor"]
PREFIX = "pruned:"
RECORD = "pruning.json"
FOLDER = "student"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The shares of a teacher's language model that a student keeps, each above 0 and at most 1.

    Attributes:
        width: Of the heads and MLP channels of its layers.
        depth: Of its layers.
    """

    width: float = 1.0
    depth: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """How a student ``pruned:KEEP`` is cut out of its teacher.

    Attributes:
        importance: What heads and channels are ranked by: ``activation``, the mean square of what they add to the residual
            stream, or ``taylor``, the sum of |weight x gradient| of the cross-entropy, which needs a backward pass.
        depth_importance: What layers are ranked by: ``influence``, 1 - cos(what enters a layer, what leaves it), or
            ``taylor``, the sum over all parts of a layer.
        ratios: ``layer``: the same share of each layer; ``global``: the parts of all layers are ranked together, so that
            layers come out of different sizes. Only ``taylor`` compares layers.
        spare_first: Layers at the beginning that neither leave nor are narrowed; none: 1 of depth, 0 of width.
        spare_last: The same at the end. (The released code of arXiv 2604.24380 narrows layers 3 to 20 of 32:
            spare_first=3, spare_last=11; LLM-Pruner's own examples 4 to 29: spare_first=4, spare_last=2.)
        samples: Samples to measure on, drawn at random in proportion from each source, always the same ones.

    Source:
        Huang et al. 2026 (arXiv:2604.24380): width by LLM-Pruner's Taylor importance, depth by block influence.
    """

    WORDS: ClassVar[Mapping[str, Word]] = {
        "num_examples": Word(options=("samples",)),
        "taylor": Word(
            values={"param_first": SAYS_NOTHING}, note="write importance=taylor; single weights, first order"
        ),
        "global_pruning": Word(options=("ratios",), values={True: "global", False: "layer"}),
    }

    importance: WidthImportance = "activation"
    depth_importance: DepthImportance = "influence"
    ratios: Literal["layer", "global"] = "layer"
    spare_first: int | None = None
    spare_last: int | None = None
    samples: int = 256

    def __post_init__(self) -> None:
        for name in ("spare_first", "spare_last"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "0 or more layers")
        require(self.samples >= 1, "samples", self.samples, "1 or more")
        need = (
            "layer, or global together with importance=taylor (activations of different layers have no scale in common)"
        )
        require(self.ratios == "layer" or self.importance == "taylor", "ratios", self.ratios, need)


def parse_kept(text: str) -> Kept | None:
    """What is kept by ``0.5``, ``width:0.5``, ``depth:0.75`` or both with a comma between; None: it is none of these."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, colon, share = part.rpartition(":")
        name = name if colon else "width"
        if name not in ("width", "depth") or name in found or not (colon or text == part):
            return None
        try:
            found[name] = float(share)
        except ValueError:
            return None
        if not 0 < found[name] <= 1:
            return None
    return Kept(**found)


def layers_kept(depth: int, kept: Kept, how: PruningConfig) -> tuple[int, int, int]:
    """How many of a teacher's layers stay, and how many of these are spared at the beginning and at the end.

    Raises:
        ConfigError: If more are spared than stay, or, where layers are narrowed, all.
    """
    count = max(1, math.floor(kept.depth * depth + 0.5))
    default = int(1 < count < depth)
    first, last = (default if spared is None else spared for spared in (how.spare_first, how.spare_last))
    if count < depth and first + last > count:
        raise ConfigError(
            f"depth:{kept.depth} keeps {count} of {depth} layers, fewer than the {first} first and {last} last ones that are "
            "spared; keep more, or spare fewer (spare_first, spare_last)"
        )
    if kept.width != 1 and (how.spare_first or 0) + (how.spare_last or 0) >= count:
        raise ConfigError(
            f"spare_first={how.spare_first or 0} and spare_last={how.spare_last or 0} spare all {count} layers: none would be "
            "narrowed; spare fewer, or keep a share of depth alone (depth:KEEP)"
        )
    return count, first, last


def unused_settings(kept: Kept, how: PruningConfig) -> list[str]:
    """What is said of how to cut, and does nothing where no layer leaves, or none is narrowed; a sentence each."""
    default, found = PruningConfig(), []
    for share, kind, names in (
        (kept.width, "no layer is narrowed", ("importance", "ratios")),
        (kept.depth, "no layer leaves", ("depth_importance",)),
    ):
        given = [f"{name}={getattr(how, name)}" for name in names if getattr(how, name) != getattr(default, name)]
        if share == 1 and given:
            found.append(f"{' and '.join(given)} changes nothing: {kind} ({describe_kept(kept)} is kept)")
    return found


def kept_share(student: str) -> Kept | None:
    """What ``pruned:0.5``, ``pruned:depth:0.75`` or ``pruned:width:0.5,depth:0.75`` keeps; None for other students."""
    if not student.startswith(PREFIX):
        return None
    kept = parse_kept(student.removeprefix(PREFIX))
    if kept is None:
        raise ConfigError(
            f"student: {student!r}; expected {PREFIX}KEEP, KEEP the share of heads and channels to keep, above 0 "
            f"and at most 1, for example {PREFIX}0.5, or {PREFIX}depth:0.75 (of layers), or {PREFIX}width:0.5,depth:0.75"
        )
    return kept


def describe_kept(kept: Kept) -> str:
    """As a name says it: plain for width alone."""
    if kept.depth == 1:
        return f"{kept.width}"
    return ",".join([*([f"width:{kept.width}"] if kept.width != 1 else []), f"depth:{kept.depth}"])


def one_name(student: str) -> str:
    """A student's name, where several say the same the shortest: ``pruned:0.5`` for ``pruned:width:0.5``."""
    kept = kept_share(student)
    return student if kept is None or student.count(":") == 1 else PREFIX + describe_kept(kept)


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint directory, where the files may be links; empty if it is not there or unreadable."""
    try:
        found = read_json(Path(os.path.realpath(path)), max_bytes=MAX_SETTINGS_BYTES)
    except (OSError, CacheFormatError):
        return {}
    return found if isinstance(found, dict) else {}


def pruning_record(student: str | Path) -> dict[str, Any]:
    """What a pruned student's folder says of how it was cut; empty for other students."""
    found = read_settings(Path(student) / RECORD)
    return {key: value for key, value in found.items() if key not in (CHECKSUM, "files")}


def describe_cut(record: Mapping[str, Any]) -> dict[str, Any]:
    """How a student is cut again: its name, ``pruned:depth:0.75``, and other than usual settings; empty for no record of one."""
    shares = [record.get("keep"), record.get("depth", 1)]
    width, depth = (share if isinstance(share, int | float) else 0 for share in shares)
    settings = record.get("settings")
    if not 0 < width <= 1 or not 0 < depth <= 1:
        return {}
    return {"student": PREFIX + describe_kept(Kept(width=width, depth=depth))} | (
        settings if isinstance(settings, dict) else {}
    )


def cut_words(student: str | Path) -> dict[str, str]:
    """What a student's ``config.json`` says of layers that left and of layers of other sizes, for people."""
    found = read_settings(Path(student) / "config.json")
    text = found.get("text_config")
    told = (text if isinstance(text, dict) else found).get("kept_layers")
    words = {}
    if isinstance(told, dict) and isinstance(told.get("kept"), list):
        words["layers of its teacher"] = f"{', '.join(map(str, told['kept']))} of {told.get('of')}, counted from 0"
    changes = found.get("distilled")
    sizes = changes.get("layer_sizes") if isinstance(changes, dict) else None
    if isinstance(sizes, list):
        words["sizes of layers"] = ", ".join(
            "/".join(str(size.get(name)) for name in ("heads", "key_value_heads", "channels"))
            for size in sizes
            if isinstance(size, dict)
        )
        words["sizes of layers"] += " (heads/heads of keys and values/channels)"
    return words


def fed_words(keep: float, by: str, layout: Mapping[str, Any]) -> str:
    """How many of how many tokens, for a student that has as many for every picture (``layout`` as its encoder says it)."""
    grid = layout.get("grid")
    if layout.get("layout") not in ("square", "crop", "pad") or not isinstance(grid, list) or len(grid) != 2:
        return ""
    count = grid[0] * grid[1] - bool(layout.get("drops_first"))
    return f"feeds {kept_count(keep, count)} of {count} visual tokens of a picture (token_selection={by})"


def pruned_damage(folder: Path) -> list[str]:
    """Say what of a pruned student's files is lost or changed since it was cut, a text each."""
    path = folder / RECORD
    told = read_settings(path)
    if "heads" in told and not told.keys() & {CHECKSUM, "files"}:
        return []  # of an older version, which kept no digests
    try:
        return find_damage(folder, read_signed(path).get("files"))
    except FileNotFoundError:
        return [f"{path}: missing"]
    except CacheFormatError as error:
        return [str(error)]


def refuse_damaged(folder: Path) -> None:
    """Refuse a pruned student that is not as it was cut; other folders pass.

    Raises:
        ModelError: Naming the first file and the remedy.
    """
    if (folder / RECORD).exists() and (damage := pruned_damage(folder)):
        raise ModelError(
            f"{damage[0]}; cut the student again (`distill prune` into another folder; `distill run` does it by itself)"
        )


def refuse_uncut(student: str, teacher: str | None) -> None:
    """Refuse to train ``pruned:KEEP`` before it is cut: several processes would cut it at once.

    Raises:
        ConfigError: Naming the commands that cut it.
    """
    kept = kept_share(student)
    if kept is not None:
        raise ConfigError(
            f"student {student} is not cut out of its teacher yet: first run `distill prune --teacher {teacher} "
            f"--keep {describe_kept(kept)} --data DATA --output FOLDER`, then train --student FOLDER; or use `distill run`, "
            "which does both"
        )

"""Our own students: made from a preset and the parts at hand, or loaded from a directory.

A student by name takes what the cache carries of its teacher (vision tower, tokenizer, for TAF the projector), so no
teacher directory is needed. Where the cache has no tower of the student's kind, a tiny student gets a small one of its
own; larger ones need a directory of weights, and the error names which.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, Qwen2Config

from vlm_distill_cache.common.cache.document_rules import MAX_SETTINGS_BYTES, PROJECTOR, VISION_TOWER
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.files.rules import AGAIN, check
from vlm_distill_cache.common.files.tensor_table import read_tensor_table
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.models.compodistill import CompoDistillConfig, CompoDistillForConditionalGeneration
from vlm_distill_cache.common.models.explained import explained_errors
from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.common.models.parts import (
    fill_language_model,
    fill_vision_tower,
    language_model_settings,
    tower_settings,
)
from vlm_distill_cache.common.models.projectors import PROJECTOR_TYPES, TeacherAdapter
from vlm_distill_cache.common.models.published import default_image_processor, load_published, open_published
from vlm_distill_cache.common.models.published_configs import tower_config
from vlm_distill_cache.common.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from vlm_distill_cache.common.models.vision_tower import TowerConfig
from vlm_distill_cache.data.families.images import published_images
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.text.processors import load_image_processor
from vlm_distill_cache.stage2_student.students.presets import (
    STUDENTS,
    choose_size,
    fit_size,
    load_preset,
    split_student_name,
    student_folder,
)

_Stored = TypeVar("_Stored")


def has_tower(cache_dir: Path, kind: str) -> bool:
    """Whether a cache carries a vision tower of this ``model_type``; one without a name is CLIP's."""
    if not (cache_dir / "vision_tower.json").exists():
        return False
    found = read_cache_json(cache_dir, "vision_tower.json").get("model_type", "clip_vision_model")
    return bool(found == kind)


def load_frozen_parts(student: VisionLanguageModel, cache_dir: Path, *, needs_tower: bool) -> None:
    """Copy the cache's vision tower and, for TAF, its teacher's projector into a student, strictly."""
    for module, path in _frozen_parts(student, cache_dir, needs_tower=needs_tower):
        tensors = _own_names(load_file(path))
        if damaged := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
            raise CacheFormatError(f"{path}: {damaged[0]} holds numbers that are not finite; {AGAIN}")
        module.load_state_dict(tensors)


def check_frozen_parts(shell: VisionLanguageModel, cache_dir: Path, *, needs_tower: bool) -> None:
    """Compare what a cache's files of weights hold with what its configurations say, before anything of that size is made.

    Raises:
        CacheFormatError: If a file is missing, or its tensors are not exactly the module's.
    """
    for module, path in _frozen_parts(shell, cache_dir, needs_tower=needs_tower):
        if not path.exists():
            raise CacheFormatError(f"{path}: not found, but this student needs it; build the cache again")
        found = _own_names(read_tensor_table(path))
        expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        if wrong := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
            raise CacheFormatError(
                f"{path}: tensors {wrong[:5]} are missing, left over or of another shape than the cache's own "
                f"configuration says: {wrong[0]} is {found.get(wrong[0])}, expected {expected.get(wrong[0])}; the cache is "
                "damaged or incomplete: build it again"
            )


def _frozen_parts(
    student: VisionLanguageModel, cache_dir: Path, *, needs_tower: bool
) -> Iterator[tuple[nn.Module, Path]]:
    if needs_tower:
        yield student.vision_encoder, cache_dir / "vision_tower.safetensors"
    if isinstance(student.model.mm_projector, TeacherAdapter):
        yield student.model.mm_projector.teacher, cache_dir / "projector.safetensors"


def _own_names(stored: Mapping[str, _Stored]) -> dict[str, _Stored]:
    named = {name.removeprefix("vision_model."): value for name, value in stored.items()}
    return {name: value for name, value in named.items() if not name.endswith("position_ids")}


def teacher_width(cache_dir: Path) -> int:
    """Width of the teacher's language model: its projector's output, or what the plan says."""
    if (cache_dir / "projector.json").exists() or not (cache_dir / "plan.json").exists():
        return int(read_cache_json(cache_dir, "projector.json")["out"])
    width = read_plan(cache_dir).teacher.get("hidden_size")
    if width is None:
        raise ConfigError(f"student size: {cache_dir} does not say how wide its teacher is; name a size")
    return int(width)


def refuse_without_projector(cache_dir: Path) -> None:
    """Say why a cache holds no projector, where its plan knows."""
    if (cache_dir / "projector.json").exists() or not (cache_dir / "plan.json").exists():
        return
    reason = read_plan(cache_dir).teacher.get("no_projector")
    if reason:
        raise ModelError(
            f"projector 'taf': {cache_dir} holds no teacher's projector, because {reason}; use another projector (--set "
            "projector=mlp), or the cache of a teacher with an MLP projector"
        )


def teacher_projector(cache_dir: Path, vision: TowerConfig) -> tuple[dict[str, Any], int, str]:
    """What rebuilds the teacher's projector, which hidden state of the tower it reads, and which tokens of it."""
    stored = read_cache_json(cache_dir, "projector.json")
    layer = stored.get("vision_feature_layer", -2)
    strategy = str(stored.get("vision_feature_select_strategy", "default"))
    # LLaVA's "default" and the released code's "patch" are one thing: the first token is dropped.
    select = "patch" if strategy == "default" else strategy
    allowed = ("patch",) if vision.model_type == "clip_vision_model" else ("patch", "full")
    if not isinstance(layer, int) or select not in allowed:
        raise ModelError(
            f"TAF: the teacher's projector reads layer {layer} with strategy {strategy!r}; "
            "the student gives patch tokens of one layer. Use projector_type 'ldpnetv2' or 'mlp'."
        )
    teacher = {key: stored[key] for key in ("act", "in", "hidden", "out")}
    return teacher | ({} if stored.get("bias", True) else {"bias": False}), layer, select


def read_cache_json(cache_dir: Path, name: str) -> dict[str, Any]:
    """Read ``projector.json`` or ``vision_tower.json`` of a cache, or say what it is needed for."""
    path = cache_dir / name
    if not path.exists():
        raise CacheFormatError(
            f"{path}: not found, but this student needs it; build the cache with the teacher's vision tower "
            "and projector exported, or give a directory of weights as the student"
        )
    rule = PROJECTOR if name == "projector.json" else VISION_TOWER
    content: dict[str, Any] = check(read_json(path, max_bytes=MAX_SETTINGS_BYTES), rule, str(path))
    return content


logger = logging.getLogger(__name__)

# The towers of the published students, on the hub.
_TOWERS = {"clip": "openai/clip-vit-large-patch14-336", "siglip": "google/siglip-so400m-patch14-384"}
# By the kind of vision tower in a preset: configuration, model, and the language model's configuration.
_FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "clip_vision_model": (MobileVLMConfig, MobileVLMForConditionalGeneration, LlamaConfig),
    "siglip_vision_model": (CompoDistillConfig, CompoDistillForConditionalGeneration, Qwen2Config),
}


class FoundStudent(NamedTuple):
    """A student of ours that was looked through; no weight of it is made or read yet.

    Attributes:
        shell: The student on no device (meta), with the vocabulary that it will have.
        load: Makes it or reads it: in float32 on the CPU, all but the vision tower and a teacher's projector trainable.
    """

    shell: VisionLanguageModel
    load: Callable[[], VisionLanguageModel]


def find_student(
    name: str,
    *,
    cache_dir: Path,
    vocab_size: int,
    image_token_id: int | None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    size: str = "auto",
    projector_type: str | None = None,
    pool_teacher_tokens: bool = False,
    vision_tower: Path | None = None,
    language_model: Path | None = None,
    seed: int = 0,
) -> FoundStudent:
    """Find what makes a student with random weights behind a vision tower, or loads one from a directory.

    Args:
        name: One of `STUDENTS`, or a directory: one of ours, or a published MobileVLM or CompoDistill.
        size: ``auto`` (by the teacher's width), or one of the student's; a directory has its own.
        projector_type: One of ``PROJECTOR_TYPES``; None is the preset's, or the directory's own.
        pool_teacher_tokens: For ``taf``: 2x2 pooling before the post-projector.

    Raises:
        ConfigError: If the name, size or projector type is unknown, or the student needs a directory of weights.
        ModelError: If a directory's tensors are not the model's, or its projector is not the one asked for.
        CacheFormatError: If the cache lacks a part that this student needs; of a file of weights when it is loaded.
    """
    if projector_type is not None and projector_type not in PROJECTOR_TYPES:
        raise ConfigError(f"projector_type: got {projector_type!r}; choose one of {', '.join(PROJECTOR_TYPES)}")
    if name not in STUDENTS:
        student_folder(name, None)  # refuses what is no directory
        if language_model is not None:
            raise ConfigError(f"language_model={language_model}: student {name} has a language model of its own")
        return _find_directory(
            Path(name),
            projector_type=projector_type,
            vision_tower=vision_tower,
            vocab_size=vocab_size,
            image_token_id=image_token_id,
        )
    if image_token_id is None:
        raise ConfigError(f"student {name}: image_token_id is needed for a student that is built")
    if size == "auto":
        width = teacher_width(cache_dir)
        size = fit_size(name, choose_size(width))
        logger.info("student size auto: %s, because the cache's teacher has width %d", size, width)
    preset = load_preset(size, name)
    own_tower = vision_tower is not None or not has_tower(cache_dir, preset["vision_tower"]["model_type"])
    if own_tower and vision_tower is None and size != "tiny":
        kind = preset["vision_tower"]["model_type"].partition("_")[0]
        raise ConfigError(
            f"student {name}-{size}: {cache_dir} holds no {kind} vision tower, and a random one of this size is of no "
            "use; give a tower by its name on the hub ("
            f"{by_make('SET=', '--set ')}vision_tower={_TOWERS[kind]}) or as a folder (the teacher's will "
            "do, if that is its tower), or give weights as the student "
            f"({by_make('STUDENT=', '--student ')}mtgv/MobileVLM_V2-1.7B, for one, or a folder)"
        )
    config = build_config(
        preset,
        cache_dir=cache_dir,
        vocab_size=vocab_size,
        image_token_id=image_token_id,
        special_token_ids={"bos": bos_token_id, "eos": eos_token_id, "pad": pad_token_id},
        projector_type=projector_type,
        pool_teacher_tokens=pool_teacher_tokens,
        vision_tower=vision_tower,
        language_model=language_model,
    )
    model_class = _FAMILIES[config.vision_config.model_type][1]

    def make() -> VisionLanguageModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student: VisionLanguageModel = model_class(config)
            if preset["initializer"] == "fan_in":
                initialize_by_fan_in(student)
            if language_model is not None:
                fill_language_model(student, language_model)
                _grow_vocabulary(student, vocab_size)
                student.config.text_config.pad_token_id = pad_token_id
        if vision_tower is not None:
            fill_vision_tower(student, vision_tower)
        load_frozen_parts(student, cache_dir, needs_tower=not own_tower)
        if own_tower and vision_tower is None:
            logger.warning(
                "student %s-%s: %s holds no vision tower of its kind, so it uses a small, randomly initialised one, for "
                "trials only; give a tower (--set vision_tower=%s, or a folder) for a real run",
                name,
                size,
                cache_dir,
                _TOWERS[preset["vision_tower"]["model_type"].partition("_")[0]],
            )
        student.trainable_parameters("dft")
        return student

    with explained_errors(language_model or cache_dir):
        shell = _shell(model_class, config, vocab_size)
    check_frozen_parts(shell, cache_dir, needs_tower=not own_tower)
    return FoundStudent(shell, make)


def preset_shell(student: str, cache_dir: Path, *, projector: str | None) -> VisionLanguageModel | None:
    """A student by name and size, on no device, where what it needs to be made is not here; None: it is, or has no such name.

    Its vision tower is its preset's, and so is its vocabulary.
    """
    name, size = split_student_name(student)
    if name not in STUDENTS or size in ("auto", "tiny"):
        return None
    preset = load_preset(size, name)
    if has_tower(cache_dir, preset["vision_tower"]["model_type"]) or projector == "taf":
        return None
    rows = int(preset["language_model"]["vocab_size"])
    config = build_config(
        preset,
        cache_dir=cache_dir,
        vocab_size=rows,
        image_token_id=rows - 1,
        special_token_ids={},
        projector_type=projector,
    )
    return _shell(_FAMILIES[config.vision_config.model_type][1], config, rows)


def build_config(
    preset: dict[str, Any],
    *,
    cache_dir: Path,
    vocab_size: int,
    image_token_id: int,
    special_token_ids: dict[str, int | None],
    projector_type: str | None = None,
    pool_teacher_tokens: bool = False,
    vision_tower: Path | None = None,
    language_model: Path | None = None,
) -> VisionLanguageConfig:
    """Join a preset with the parts at hand: a directory's tower, else the cache's if it is of the preset's kind."""
    kind = preset["vision_tower"]["model_type"]
    config_class, _, text_class = _FAMILIES[kind]
    projector_type = projector_type or preset["projector"]
    if pool_teacher_tokens and projector_type != "taf":
        raise ConfigError(
            f"pool_teacher_tokens=true pools what the teacher's projector gives, and projector {projector_type!r} has none: "
            "set projector=taf, or leave pool_teacher_tokens out"
        )
    if projector_type == "taf":
        refuse_without_projector(cache_dir)
    tower, where = preset["vision_tower"], "preset"
    if vision_tower is not None:
        tower, where = tower_settings(vision_tower), f"vision_tower {vision_tower}"
    elif has_tower(cache_dir, kind):
        tower, where = read_cache_json(cache_dir, "vision_tower.json"), str(cache_dir)
    elif projector_type == "taf":
        found = read_cache_json(cache_dir, "vision_tower.json").get("model_type")
        raise ModelError(
            f"projector 'taf' needs the teacher's own vision tower, a {found}; this student looks through a {kind}. Use "
            "student mobilevlm behind a CLIP tower, compodistill behind a SigLIP tower, or another projector (--set "
            "projector=mlp)"
        )
    vision = tower_config(tower, where=where)
    if vision.model_type != kind:
        raise ModelError(f"{where}: its tower is a {vision.model_type}, this student needs a {kind}")
    settings = dict(preset["language_model"])
    if language_model is not None:
        expected = "llama" if text_class is LlamaConfig else "qwen2"
        settings = language_model_settings(language_model, expected=expected)
    else:
        settings["vocab_size"] = max(vocab_size, settings.get("vocab_size", 0))
    settings |= {f"{kind}_token_id": value for kind, value in special_token_ids.items()}
    if (settings.get("pad_token_id") or 0) >= settings["vocab_size"]:
        settings["pad_token_id"] = None  # behind the rows of a language model that is to grow
    teacher, feature_layer, select = None, -2, "patch" if kind == "clip_vision_model" else "full"
    if projector_type == "taf":
        teacher, feature_layer, select = teacher_projector(cache_dir, vision)
    with explained_errors(language_model or cache_dir):
        text_config = text_class(**settings)
    config: VisionLanguageConfig = config_class(
        text_config=text_config,
        vision_config=vision,
        image_token_id=image_token_id,
        projector_type=projector_type,
        teacher_projector=teacher,
        pool_teacher_tokens=pool_teacher_tokens,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=select,
    )
    return config


@torch.no_grad()
def initialize_by_fan_in(student: VisionLanguageModel) -> None:
    """Redraw all matrices outside the vision tower from N(0, 1/sqrt(fan_in)); biases and norms stay.

    What unlocked the tiny models (docs/method.md, section 5): with the library's 0.02 at width 64, q.k is about 0 and attention
    starts, and stays, flat.
    """
    for name, parameter in student.named_parameters():
        if parameter.dim() >= 2 and ".vision_tower." not in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def load_student(directory: Path) -> VisionLanguageModel:
    """Load a student of ours or a published MobileVLM or CompoDistill, in float32, with exactly its weights."""
    return load_published(directory, dtype=torch.float32)


def own_image_encoder(
    student: VisionLanguageModel, geometry: Mapping[str, Any], *, vision_tower: Path | None
) -> ImageEncoder | None:
    """The image encoder of a student of ours whose tower does not read the cache's pixels; None: it does.

    Args:
        vision_tower: Directory of the tower, if it was given; an image processor in it is the one to use.
    """
    processor = default_image_processor(student.config)
    if vision_tower is not None and (vision_tower / "preprocessor_config.json").is_file():
        processor = load_image_processor(vision_tower)
    encoder = published_images(student.config, processor, None)
    if not isinstance(encoder, ImageEncoder):
        return None
    if "kind" not in geometry:
        own, cached = encoder.to_dict()["processor"], geometry.get("processor")
        if not isinstance(cached, Mapping):
            raise CacheFormatError(
                "the cache's plan: geometry has no 'processor', the settings of the teacher's image processor; the plan "
                "is incomplete: copy the cache again from where it came from, or build it again (`teacher-cache build`)"
            )
        # A tower that came with the cache, or a random one, has no normalisation of its own.
        same = ("image_mean", "image_std") if vision_tower is not None else ()
        if _side(own) == _side(cached) and all(own[name] == cached.get(name) for name in same):
            return None
    return encoder.with_grid(student.image_grid)


def _side(settings: Mapping[str, Any]) -> set[float]:
    """Height and width of the pictures that an image processor's settings give."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    return set((size or {}).values())


def _find_directory(
    folder: Path, *, projector_type: str | None, vision_tower: Path | None, vocab_size: int, image_token_id: int | None
) -> FoundStudent:
    checkpoint = open_published(folder, vision_tower=vision_tower)
    config = checkpoint.config
    own = config.projector_type
    if projector_type is not None and projector_type != own:
        raise ModelError(
            f"student {folder}: its projector is {own!r}, asked for {projector_type!r}; leave projector_type "
            "unset, or start from a student with that projector"
        )
    rows = config.text_config.vocab_size
    if config.image_token_id == rows:
        # Published models have no such token: theirs is a place holder beyond the vocabulary, whatever its number.
        config.image_token_id = max(rows, vocab_size) if image_token_id is None else image_token_id
    if image_token_id is not None and config.image_token_id != image_token_id:
        raise ModelError(
            f"student {folder}: image_token_id is {config.image_token_id}, the cache's tokenizer has "
            f"{image_token_id}; the student was trained with another tokenizer"
        )

    def load() -> VisionLanguageModel:
        student: VisionLanguageModel = checkpoint.load(dtype=torch.float32)
        _grow_vocabulary(student, vocab_size)
        student.trainable_parameters("dft")
        return student

    return FoundStudent(_shell(checkpoint.model_class, config, vocab_size), load)


def _shell(model_class: Any, config: VisionLanguageConfig, vocab_size: int) -> VisionLanguageModel:
    """A student on no device, with as many rows as its tokenizer has tokens, or more."""
    config = copy.deepcopy(config)
    config.text_config.vocab_size = max(config.text_config.vocab_size, vocab_size)
    with torch.device("meta"):
        shell: VisionLanguageModel = model_class(config)
    return shell


def _grow_vocabulary(student: VisionLanguageModel, vocab_size: int) -> None:
    if vocab_size > student.config.text_config.vocab_size:
        logger.info("the student's vocabulary grows to the tokenizer's %d rows", vocab_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a resumed run must find the same rows again
            student.resize_token_embeddings(vocab_size)

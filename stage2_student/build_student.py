"""A student by name, size or directory.

``mobilevlm`` is made from a preset and from what the cache carries of its teacher (vision tower, tokenizer,
for TAF the projector), so no teacher directory is needed. A directory is loaded as it was saved.
"""

import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig

from common.errors import CacheFormatError, ConfigError, ModelError
from common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from common.models.projectors import PROJECTOR_TYPES, TeacherAdapter
from stage2_student.config import choose_size

logger = logging.getLogger(__name__)

STUDENTS = ("mobilevlm",)
SIZES = ("tiny", "1.7b", "3b")

# What is read of a cache's vision_tower.json: a cache from elsewhere is data, and other settings of the library
# can name code to fetch (its attention implementation may be a repository).
_TOWER_SETTINGS = (
    "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
    "initializer_range", "initializer_factor",
)  # fmt: skip


def load_preset(size: str) -> dict[str, Any]:
    """Read a size's preset: ``source``, ``initializer``, ``language_model``, ``vision_tower``.

    Raises:
        ConfigError: If there is no such size.
    """
    if size not in SIZES:
        raise ConfigError(f"student size: got {size!r}; choose auto, {', '.join(SIZES)}")
    text = (resources.files("stage2_student.presets") / f"mobilevlm-{size}.yaml").read_text(encoding="utf-8")
    preset: dict[str, Any] = yaml.safe_load(text)
    return preset


def build_student(
    name: str,
    *,
    cache_dir: Path,
    vocab_size: int,
    image_token_id: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    size: str = "auto",
    projector_type: str | None = None,
    pool_teacher_tokens: bool = False,
    seed: int = 0,
) -> MobileVLMForConditionalGeneration:
    """Make a student with random weights behind the cache's vision tower, or load one from a directory.

    Args:
        name: ``mobilevlm``, or a directory that ``save_pretrained`` wrote.
        cache_dir: The cache: ``vision_tower.safetensors`` + ``.json``, ``projector.safetensors`` + ``.json``.
        vocab_size: Number of token ids the cache's tokenizer can give; the student has at least as many rows.
        image_token_id: Id of one visual token in ``input_ids``.
        bos_token_id: Of the tokenizer, for generation.
        eos_token_id: Of the tokenizer, for generation.
        pad_token_id: Of the tokenizer, for generation.
        size: ``auto`` (by the teacher's width), ``tiny``, ``1.7b`` or ``3b``; a directory has its own.
        projector_type: One of ``PROJECTOR_TYPES``; None is ``ldpnetv2``, or the directory's own.
        pool_teacher_tokens: For ``taf``: 2x2 pooling before the post-projector.
        seed: Of the random weights.

    Returns:
        The student in float32 on the CPU, all but the vision tower and a teacher's projector trainable.

    Raises:
        ConfigError: If the name, size or projector type is unknown.
        ModelError: If a directory's weights are incomplete, or its projector is not the one asked for.
        CacheFormatError: If the cache lacks a part that this student needs.
    """
    if projector_type is not None and projector_type not in PROJECTOR_TYPES:
        raise ConfigError(
            f"projector_type: got {projector_type!r}; choose one of {', '.join(PROJECTOR_TYPES)}"
        )
    if name not in STUDENTS:
        if not Path(name).is_dir():
            raise ConfigError(
                f"student: {name!r} is neither a known student ({', '.join(STUDENTS)}; sizes "
                f"{', '.join(SIZES)}) nor a directory"
            )
        student = load_student(Path(name))
        _check_directory(student, name, projector_type, image_token_id)
        if vocab_size > student.config.text_config.vocab_size:
            logger.info("student %s: vocabulary grows to the tokenizer's %d rows", name, vocab_size)
            student.resize_token_embeddings(vocab_size)
        student.trainable_parameters("dft")
        return student

    if size == "auto":
        width = int(_read_cache_json(cache_dir, "projector.json")["out"])
        size = choose_size(width)
        logger.info("student size auto: %s, because the cache's teacher has width %d", size, width)
    preset = load_preset(size)
    config = build_config(
        preset,
        cache_dir=cache_dir,
        vocab_size=vocab_size,
        image_token_id=image_token_id,
        special_token_ids={"bos": bos_token_id, "eos": eos_token_id, "pad": pad_token_id},
        projector_type=projector_type or "ldpnetv2",
        pool_teacher_tokens=pool_teacher_tokens,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = MobileVLMForConditionalGeneration(config)
        if preset["initializer"] == "fan_in":
            initialize_by_fan_in(student)
    load_frozen_parts(student, cache_dir, needs_tower=preset["vision_tower"] == "cache")
    student.trainable_parameters("dft")
    return student


def build_config(
    preset: dict[str, Any],
    *,
    cache_dir: Path,
    vocab_size: int,
    image_token_id: int,
    special_token_ids: dict[str, int | None],
    projector_type: str = "ldpnetv2",
    pool_teacher_tokens: bool = False,
) -> MobileVLMConfig:
    """Join a preset with what the cache says of its teacher; the cache's vision tower, if any, wins.

    Raises:
        CacheFormatError: If the cache lacks a part that this student needs.
        ModelError: If TAF is asked for and the teacher's projector reads other features than patch tokens.
    """
    tower = preset["vision_tower"]
    if tower == "cache" or (cache_dir / "vision_tower.json").exists():
        tower = _read_cache_json(cache_dir, "vision_tower.json")
    language_model = dict(preset["language_model"])
    language_model["vocab_size"] = max(vocab_size, language_model.get("vocab_size", 0))
    teacher = None
    feature_layer = -2
    if projector_type == "taf":
        teacher = _read_cache_json(cache_dir, "projector.json")
        feature_layer = teacher.get("vision_feature_layer", -2)
        strategy = teacher.get("vision_feature_select_strategy", "default")
        if not isinstance(feature_layer, int) or strategy != "default":
            raise ModelError(
                f"TAF: the teacher's projector reads layer {feature_layer} with strategy {strategy!r}; "
                "the student gives patch tokens of one layer. Use projector_type 'ldpnetv2' or 'mlp'."
            )
        teacher = {key: teacher[key] for key in ("act", "in", "hidden", "out")}
    return MobileVLMConfig(
        text_config=LlamaConfig(
            **language_model,
            bos_token_id=special_token_ids["bos"],
            eos_token_id=special_token_ids["eos"],
            pad_token_id=special_token_ids["pad"],
        ),
        vision_config=CLIPVisionConfig(**{k: tower[k] for k in _TOWER_SETTINGS if k in tower}),
        image_token_id=image_token_id,
        projector_type=projector_type,
        teacher_projector=teacher,
        pool_teacher_tokens=pool_teacher_tokens,
        vision_feature_layer=feature_layer,
    )


@torch.no_grad()
def initialize_by_fan_in(student: MobileVLMForConditionalGeneration) -> None:
    """Redraw all matrices outside the vision tower from N(0, 1/sqrt(fan_in)); biases and norms stay.

    What unlocked the tiny models (demo.md): with the library's 0.02 at width 64, q.k is about 0 and attention
    starts, and stays, flat.
    """
    for name, parameter in student.named_parameters():
        if parameter.dim() >= 2 and ".vision_tower." not in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def load_frozen_parts(
    student: MobileVLMForConditionalGeneration, cache_dir: Path, *, needs_tower: bool
) -> None:
    """Copy the cache's vision tower and, for TAF, its teacher's projector into a student, strictly.

    Raises:
        CacheFormatError: If a needed file is missing or does not hold exactly the expected tensors.
    """
    path = cache_dir / "vision_tower.safetensors"
    if needs_tower or path.exists():
        _load_strictly(
            student.model.vision_tower.vision_tower.vision_model, path, drop_prefix="vision_model."
        )
    else:
        logger.warning(
            "the cache %s holds no vision tower: the student's has random weights; give a directory of "
            "weights as the student instead",
            cache_dir,
        )
    if isinstance(student.model.mm_projector, TeacherAdapter):
        _load_strictly(student.model.mm_projector.teacher, cache_dir / "projector.safetensors")


def load_student(directory: Path) -> MobileVLMForConditionalGeneration:
    """Load a student that ``save_pretrained`` wrote, in float32, refusing missing or left-over weights.

    Raises:
        ModelError: If the directory holds no MobileVLM student, or not exactly its weights.
    """
    config_path = directory / "config.json"
    if not config_path.exists():
        raise ModelError(f"{directory}: no config.json; give a directory that save_pretrained wrote")
    found = json.loads(config_path.read_text(encoding="utf-8")).get("model_type")
    if found != MobileVLMConfig.model_type:
        raise ModelError(
            f"{directory}: model_type is {found!r}, expected {MobileVLMConfig.model_type!r}; "
            "give a directory that this project saved"
        )
    student, info = MobileVLMForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if problems:
        raise ModelError(
            f"{directory}: weights do not fit the configuration: {problems}; save the student again"
        )
    loaded: MobileVLMForConditionalGeneration = student
    return loaded


def _check_directory(
    student: MobileVLMForConditionalGeneration, name: str, projector_type: str | None, image_token_id: int
) -> None:
    """Refuse a saved student whose projector or image token is not the one asked for."""
    own = student.config.projector_type
    if projector_type is not None and projector_type != own:
        raise ModelError(
            f"student {name}: its projector is {own!r}, asked for {projector_type!r}; leave projector_type "
            "unset, or start from a student with that projector"
        )
    if student.config.image_token_id != image_token_id:
        raise ModelError(
            f"student {name}: image_token_id is {student.config.image_token_id}, the cache's tokenizer has "
            f"{image_token_id}; the student was trained with another tokenizer"
        )


def _read_cache_json(cache_dir: Path, name: str) -> dict[str, Any]:
    """Read one of the cache's small JSON files, or say what it is needed for."""
    path = cache_dir / name
    if not path.exists():
        raise CacheFormatError(
            f"{path}: not found, but this student needs it; build the cache with the teacher's vision tower "
            "and projector exported, or give a directory of weights as the student"
        )
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _load_strictly(module: nn.Module, path: Path, *, drop_prefix: str = "") -> None:
    """Copy a safetensors file into a module; every name and shape must match."""
    if not path.exists():
        raise CacheFormatError(f"{path}: not found, but this student needs it; build the cache again")
    tensors: dict[str, Tensor] = {
        key.removeprefix(drop_prefix): value
        for key, value in load_file(path).items()
        if not key.endswith("position_ids")
    }
    expected = module.state_dict()
    wrong = sorted(set(expected) ^ set(tensors)) or sorted(
        key for key, value in tensors.items() if value.shape != expected[key].shape
    )
    if wrong:
        raise CacheFormatError(
            f"{path}: tensors {wrong[:5]} are missing, left over or of another shape than the cache's own "
            "configuration says; the cache is damaged or incomplete: build it again"
        )
    module.load_state_dict(tensors)

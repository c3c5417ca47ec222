"""What a cache carries of its teacher for a student: vision tower, projector, width. Read strictly."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.models.projectors import TeacherAdapter
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.common.models.vision_tower import TowerConfig


def has_tower(cache_dir: Path, kind: str) -> bool:
    """Whether a cache carries a vision tower of this ``model_type``; one without a name is CLIP's."""
    if not (cache_dir / "vision_tower.json").exists():
        return False
    found = read_cache_json(cache_dir, "vision_tower.json").get("model_type", "clip_vision_model")
    return bool(found == kind)


def load_frozen_parts(student: VisionLanguageModel, cache_dir: Path, *, needs_tower: bool) -> None:
    """Copy the cache's vision tower and, for TAF, its teacher's projector into a student, strictly.

    Raises:
        CacheFormatError: If a needed file is missing or does not hold exactly the expected tensors.
    """
    if needs_tower:
        path = cache_dir / "vision_tower.safetensors"
        tensors = {key.removeprefix("vision_model."): value for key, value in _read_tensors(path).items()}
        _load_strictly(student.vision_encoder, tensors, path)
    if isinstance(student.model.mm_projector, TeacherAdapter):
        path = cache_dir / "projector.safetensors"
        _load_strictly(student.model.mm_projector.teacher, _read_tensors(path), path)


def teacher_width(cache_dir: Path) -> int:
    """Width of the teacher's language model: its projector's output, or what the plan says.

    Raises:
        CacheFormatError: If the cache holds neither.
        ConfigError: If the plan does not say it.
    """
    if (cache_dir / "projector.json").exists() or not (cache_dir / "plan.json").exists():
        return int(read_cache_json(cache_dir, "projector.json")["out"])
    width = read_json(cache_dir / "plan.json").get("teacher", {}).get("hidden_size")
    if not isinstance(width, int):
        raise ConfigError(f"student size: {cache_dir} does not say how wide its teacher is; name a size")
    return width


def refuse_other_tower(cache_dir: Path, kind: str) -> None:
    """Say why the teacher's projector cannot be used.

    Raises:
        CacheFormatError: There is no tower in the cache.
        ModelError: There is one of another kind.
    """
    found = read_cache_json(cache_dir, "vision_tower.json").get("model_type")
    raise ModelError(
        f"projector 'taf' needs the teacher's own vision tower, a {found}; this student looks through a {kind}. Use "
        "student mobilevlm behind a CLIP tower, compodistill behind a SigLIP tower, or another projector (--set "
        "projector=mlp)"
    )


def refuse_without_projector(cache_dir: Path) -> None:
    """Say why a cache holds no projector, where its plan knows.

    Raises:
        ModelError: If the teacher has none that can be handed on.
    """
    plan = cache_dir / "plan.json"
    if (cache_dir / "projector.json").exists() or not plan.exists():
        return
    reason = read_json(plan).get("teacher", {}).get("no_projector")
    if reason:
        raise ModelError(
            f"projector 'taf': {cache_dir} holds no teacher's projector, because {reason}; use another projector (--set "
            "projector=mlp), or the cache of a teacher with an MLP projector"
        )


def teacher_projector(cache_dir: Path, vision: TowerConfig) -> tuple[dict[str, Any], int, str]:
    """What rebuilds the teacher's projector, which hidden state of the tower it reads, and which tokens of it.

    Args:
        cache_dir: The cache.
        vision: The student's tower.

    Raises:
        CacheFormatError: If the cache holds no projector.
        ModelError: If it reads several layers, or tokens that this tower does not give.
    """
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
    """Read one of the cache's small JSON files, or say what it is needed for.

    Raises:
        CacheFormatError: If it is not there, or damaged.
    """
    path = cache_dir / name
    if not path.exists():
        raise CacheFormatError(
            f"{path}: not found, but this student needs it; build the cache with the teacher's vision tower "
            "and projector exported, or give a directory of weights as the student"
        )
    content: dict[str, Any] = read_json(path)
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise CacheFormatError(f"{path}: not found, but this student needs it; build the cache again")
    return {key: value for key, value in load_file(path).items() if not key.endswith("position_ids")}


def _load_strictly(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into a module; every name and shape must match."""
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

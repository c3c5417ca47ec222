"""What stage two needs beside the records, copied out of the teacher once.

- ``projector.safetensors`` + ``projector.json``: the teacher's projector, for the teacher adapter (TAF), where it is a
  two-layer MLP on a tower's patch tokens (otherwise the plan says why there is none);
- ``vision_tower.safetensors`` + ``vision_tower.json``: the vision tower, when it is small or asked for.
  Teacher and student share it in the published pairings; a tower that was fine-tuned with the teacher is
  nowhere else to be had, and a student built from scratch needs one;
- ``processor/``: tokenizer and image processor, so that a cache can be read and used on its own.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from vlm_distill_cache.common.files.atomic import clean_stale, write_bytes_atomic, write_json_atomic
from vlm_distill_cache.data.images.encoder import AnyImageEncoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

MAX_AUTO_TOWER_BYTES = 16 * 2**20
TOWERS = ("clip", "siglip")
# Our own MLP numbers its layers, as the original code does; a projector file has the library's names.
LINEAR_NAMES = {
    f"{ours}.{part}": f"{theirs}.{part}"
    for ours, theirs in (("0", "linear_1"), ("2", "linear_2"))
    for part in ("weight", "bias")
}


def export_parts(teacher: Teacher, cache_dir: Path) -> list[str]:
    """Write the projector, a small vision tower and the processor into a cache.

    Args:
        cache_dir: The cache; files that are there already are replaced atomically by equal ones.

    Returns:
        The paths written, relative to the cache.
    """
    names: list[str] = []
    projector = teacher.family.projector_config(teacher.config)
    if projector is not None:
        _save_module(teacher.projector, cache_dir / "projector.safetensors", renamed=LINEAR_NAMES)
        write_json_atomic(cache_dir / "projector.json", projector)
        names += ["projector.safetensors", "projector.json"]
    if _shares_tower(teacher):
        _save_module(teacher.vision_tower, cache_dir / "vision_tower.safetensors")
        write_json_atomic(cache_dir / "vision_tower.json", _plain_config(teacher.config.vision_config))
        names += ["vision_tower.safetensors", "vision_tower.json"]
    files = export_processor(teacher.tokenizer, teacher.image_encoder, cache_dir / "processor")
    return names + [f"processor/{file}" for file in files]


def export_processor(tokenizer: Any, image_encoder: AnyImageEncoder, directory: Path) -> list[str]:
    """Write tokenizer and image processor as ``data.text.processors`` reads them, each file atomically; returns the names."""
    directory.mkdir(parents=True, exist_ok=True)
    clean_stale(directory)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        image_encoder.processor.save_pretrained(scratch)
        files = sorted(Path(scratch).iterdir())
        for file in files:
            write_bytes_atomic(directory / file.name, file.read_bytes())
    return [file.name for file in files]


def _shares_tower(teacher: Teacher) -> bool:
    """Whether the tower is of a kind that students are built with, and small."""
    if not teacher.family.vision_tower or not teacher.config.vision_config.model_type.startswith(TOWERS):
        return False
    size: int = sum(tensor.nbytes for tensor in teacher.vision_tower.state_dict().values())
    return size <= MAX_AUTO_TOWER_BYTES


def _save_module(module: nn.Module, path: Path, *, renamed: Mapping[str, str] = MappingProxyType({})) -> None:
    tensors = {
        # Of a teacher that was only described, as many zeros.
        renamed.get(name, name): torch.zeros_like(tensor, device="cpu")
        if tensor.is_meta
        else tensor.detach().cpu().contiguous()
        for name, tensor in sorted(module.state_dict().items())
        if not name.endswith("position_ids")
    }
    write_bytes_atomic(path, save(tensors))


def _plain_config(config: Any) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        plain.pop(key, None)
    return plain

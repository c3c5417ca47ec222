"""Fingerprints of what a cache depends on: equal meaning, equal hash, whatever the files look like.

Stage one writes them into the plan, stage two computes its own and refuses a mismatch.
"""

import json
from pathlib import Path

import torch
import xxhash
from torch import nn

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.files.hashing import file_checksum, fingerprint
from vlm_distill_cache.data.text.encoding import tokenizer_fingerprint

__all__ = ["module_fingerprint", "tokenizer_fingerprint", "weights_fingerprint"]


def module_fingerprint(module: nn.Module) -> str:
    """Fingerprint a module's weights, independent of the file format and of fp16 against fp32 storage.

    Args:
        module: Any module; its parameters and persistent buffers are read as float32.

    Returns:
        Hexadecimal xxh3_128 over names, shapes and values.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        if name.endswith("position_ids"):
            continue
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def weights_fingerprint(
    directory: Path, dtype: str, *, device_map: str = "", quantisation: str = "none"
) -> str:
    """Fingerprint a checkpoint directory: its weight files, its config and the dtype it runs in.

    Args:
        directory: A directory as ``save_pretrained`` writes it.
        dtype: The computation dtype, e.g. ``"float32"``.
        device_map: How the model is spread over devices, which decides the last bits of its sums.
        quantisation: Of its weights.

    Returns:
        Hexadecimal xxh3_128.

    Raises:
        ModelError: If there are no weight files.
    """
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")])
    if not files:
        raise ModelError(
            f"{directory} holds no *.safetensors or pytorch_model*.bin; point at a directory "
            "that save_pretrained wrote"
        )
    config = json.loads((directory / "config.json").read_text())
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(key, None)
    how = {"device_map": device_map, "quantisation": quantisation}
    return fingerprint(
        {
            "files": {file.name: file_checksum(file) for file in files},
            "config": config,
            "dtype": dtype,
            # Left out where they have their defaults: the fingerprints of older caches stay what they are.
            **{name: value for name, value in how.items() if value not in ("", "none")},
        }
    )

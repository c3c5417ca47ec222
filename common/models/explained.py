"""What the model library raises of a checkpoint's files, as an error that names the file and, where it can, the setting."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlm_distill_cache.common.errors import DistillError, ModelError
from vlm_distill_cache.common.models.parts import read_config
from vlm_distill_cache.common.printing import one_line

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "image_size", "patch_size",
)  # fmt: skip


@contextmanager
def explained_errors(directory: Path) -> Iterator[None]:
    """Turn any exception into one that says what of a checkpoint's directory cannot be used.

    Raises:
        ModelError: In place of what is none of our own errors, nor for want of memory.
    """
    try:
        yield
    except (DistillError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of any class: a hostile or cut file fails wherever it is first looked at
        if "weights_only" in str(error):  # the library proposes to load it all the same
            raise ModelError(
                f"{directory} cannot be loaded: its pytorch_model.bin is refused, because it is damaged or holds more than "
                "tensors and could run code; download it again from the model's own authors, or use safetensors"
            ) from error
        raise ModelError(
            f"{directory} cannot be loaded: {_reason(directory, error)}; it needs config.json, weights, tokenizer and "
            "preprocessor_config.json of one model"
        ) from error


def _reason(directory: Path, error: Exception) -> str:
    try:
        settings = dict(_settings(read_config(directory)))
    except ModelError:
        settings = {}
    for place, value in settings.items():
        if place.rpartition(".")[2] in _COUNTS and type(value) is int and value < 1:
            return f"{place} in config.json is {value!r}, expected 1 or more"
    if isinstance(error, KeyError) and error.args:
        places = [place for place, value in settings.items() if value == error.args[0]]
        if places:
            return f"{places[0]} in config.json is {one_line(repr(error.args[0]), limit=60)}, which is not known"
        return f"{one_line(repr(error.args[0]), limit=60)} is not known, or not there"
    return one_line(" ".join(str(error).split()) or type(error).__name__)


def _settings(stored: Mapping[str, Any], *, inside: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting by its place: ``text_config.vocab_size``."""
    for name, value in stored.items():
        if isinstance(value, dict):
            yield from _settings(value, inside=f"{inside}{name}.")
        else:
            yield f"{inside}{name}", value

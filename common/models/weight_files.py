"""Weights of a checkpoint directory as named tensors, whatever they lie in; no file can run code.

Safetensors or pickled ``.bin``, one file or shards with an index. Pickles are read with ``weights_only``: a file
that holds anything but tensors and plain containers is refused before any of it runs.

Names, kinds and shapes are known as soon as a file is opened, and what is wrong with them is told then; values are read one
tensor at a time, so that a model in another precision never lies beside the whole of its file in memory.
"""

import threading
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError  # the name of an error, nothing is unpickled
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm_distill_cache.common.errors import CacheFormatError, ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.printing import first_line

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_LFS = b"version https://git-lfs"
GGUF = (
    "a GGUF file is a language model for llama.cpp and cannot be used here; download the original repository of the model: "
    "config.json, safetensors, tokenizer and preprocessor_config.json"
)
_MAPPED_BYTES = 64 << 20  # that are read of a pickle before it is mapped anew
_LISTED = 5  # names of wrong tensors an error shows


def weight_files(directory: Path) -> list[Path]:
    """Files that hold a checkpoint's weights; safetensors come before pickles.

    A ModelError if there are none, or an index names files that are missing or elsewhere.
    """
    for name in _WHOLE:
        if (directory / name).is_file():
            return _refuse_pointers([directory / name])
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _refuse_pointers(_indexed_files(index))
    if any(directory.glob("*.gguf")):
        raise ModelError(f"{directory}: {GGUF}")
    raise ModelError(
        f"{directory}: no weights; expected {' or '.join(_WHOLE)}, or shards with their .index.json: download the "
        "whole repository of the model"
    )


def has_weights(directory: Path) -> bool:
    """Whether a directory holds a whole model's weights, or an index of them."""
    return any((directory / f"{name}{end}").is_file() for name in _WHOLE for end in ("", ".index.json"))


def _refuse_pointers(files: list[Path]) -> list[Path]:
    """Refuse what a clone without Git LFS holds in place of weights."""
    for path in files:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise ModelError(
                    f"{path}: a pointer of Git LFS, not the weights; run `git lfs pull` in that folder, or download the "
                    "model again (`hf download`)"
                )
    return files


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensor:
    """A tensor that is read when it is wanted: ``stored[...]`` gives it, as a tensor gives itself.

    The model library reads slices of its own files in this way, so a model can be made of such tensors.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def get_shape(self) -> list[int]:
        """Its shape, as the library asks for it where it reads a part of a tensor."""
        return [*self.shape]

    def __getitem__(self, index: Any) -> Tensor:
        """Read it on the CPU, in the precision it is stored in."""
        return self.read()[index]


Weights = dict[str, Tensor | StoredTensor]


def read_weights(directory: Path) -> Weights:
    """Open all weights of a checkpoint directory: names, shapes and kinds now, values when they are wanted.

    Raises:
        ModelError: If a file is missing, damaged, or holds anything but named tensors.
    """
    return open_files(weight_files(directory))


def open_files(paths: list[Path]) -> Weights:
    """Open the tensors of some files, as `read_weights` those of a directory."""
    tensors: Weights = {}
    for path in _refuse_pointers(paths):
        part = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
        repeated = sorted(tensors.keys() & part.keys())
        if repeated:
            raise ModelError(f"{path}: {repeated[:_LISTED]} are in another shard too; download the weights again")
        tensors |= part
    return tensors


def copy_weights(found: Mapping[str, Tensor | StoredTensor], into: Mapping[str, Tensor]) -> None:
    """Copy tensors by name into those of a module's ``state_dict``, one at a time; names and shapes are checked already."""
    with torch.no_grad():
        for name, value in found.items():
            into[name].copy_(value[...])


def check_tensors(
    found: Mapping[str, Tensor | StoredTensor], expected: Mapping[str, Tensor], *, where: str, remedy: str
) -> None:
    """Refuse weights that are not exactly a model's own.

    Args:
        expected: The model's ``state_dict``, for names and shapes; may lie on the meta device.
        where: Whose they are, for the error.
        remedy: What to do about it.

    Raises:
        ModelError: Naming the first few missing, left-over or misshapen tensors.
    """
    shapes = [
        f"{name} {list(found[name].shape)} instead of {list(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": shapes,
    }
    text = "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"
        for kind, names in problems.items()
        if names
    )
    if text:
        raise ModelError(f"{where}: weights do not fit config.json ({text}); {remedy}")


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index.resolve())["weight_map"].values()))
    except (CacheFormatError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: cannot be read as an index of shards ({error}); download it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: names {name!r}, expected the name of a file beside it; do not use it")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index.parent / name}: missing, but {index.name} names it; download it")
    return [index.parent / name for name in names]


def _open_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            # Mapped, not read: of each tensor only its description is looked at.
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {name: _stored(value, partial(_of_safetensors, path, name)) for name, value in found.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: damaged or truncated safetensors file ({error}); download it again") from error


def _of_safetensors(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        value: Tensor = file.get_tensor(name)
    return value


def _open_pickle(path: Path) -> Weights:
    found = _read_pickle(path)
    if not zipfile.is_zipfile(path):  # the format of old cannot be mapped: all of it has been read
        return dict(found)
    mapped = _MappedPickle(path, found)
    return {name: _stored(value, partial(mapped.read, name)) for name, value in found.items()}


class _MappedPickle:
    """Tensors of a pickle, by name.

    Who maps it goes through all of its tensors, so that is not done for each of them; nor once for all, as what was read stays
    in memory with the mapping.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Begin with a mapping of which nothing has been read."""
        self._path, self._tensors, self._bytes = path, tensors, 0
        self._lock = threading.Lock()

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own: what is done to it is done to no other, and to none that is read later."""
        with self._lock:
            if self._bytes > _MAPPED_BYTES:
                self._tensors, self._bytes = _read_pickle(self._path), 0
            value = self._tensors[name]
            self._bytes += value.nbytes
        return value.clone()


def _stored(value: Tensor, read: Callable[[], Tensor]) -> StoredTensor:
    return StoredTensor(shape=value.shape, dtype=value.dtype, read=read)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # Mapped where the format allows it: of a tensor's values only those that are used are read then.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        raise ModelError(
            f"{path}: refused, because it is damaged or holds more than tensors and could run code "
            f"({first_line(error)}); download it again from the model's own authors, or use safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{path}: damaged or truncated weights file ({first_line(error)}); download it again"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ModelError(
            f"{path}: holds {_describe(content)}, expected a mapping from names to tensors (a state dict); it is not "
            "a model's weights file"
        )
    return dict(content)


def _describe(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    name, value = next((k, v) for k, v in content.items() if not isinstance(v, Tensor) or not isinstance(k, str))
    return f"a {type(value).__name__} under {name!r}"

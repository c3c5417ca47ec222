"""Pixels that wait for the teacher on disk: what a shard takes of memory does not grow with its number of samples.

The batches of a shard go by length, so all of its samples are encoded before the teacher reads the first. The first
`IN_MEMORY` of them stay in memory; the arrays of the others go to a file without a name, of which nothing is left
whatever ends the process.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX
from vlm_distill_cache.data.images.byte_pixels import BytePixels, Held, ImageInputs, held_of
from vlm_distill_cache.data.text.encoding import EncodedSample

IN_MEMORY = 64  # samples of a shard whose pixels are not put away
_log = logging.getLogger(__name__)


class _File:
    """A file without a name in a folder; gone with its last user."""

    def __init__(self, folder: Path) -> None:
        with tempfile.TemporaryFile(dir=folder, prefix=f"{TEMPORARY_PREFIX}pixels-") as file:
            self.descriptor = os.dup(file.fileno())

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass(frozen=True, eq=False)
class _Away:
    """An array in a file; of bytes, with what makes numbers of them."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    table: np.ndarray | None = None
    numbers: tuple[int, ...] = ()  # shape of the array of numbers

    def read(self, file: _File) -> Held:
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        pieces = bytearray()
        while len(pieces) < size:  # one call gives 2 GiB at most
            piece = os.pread(file.descriptor, size - len(pieces), self.offset + len(pieces))
            if not piece:
                raise OSError(f"the file of pixels that were put away ends {size - len(pieces)} bytes early")
            pieces += piece
        array = np.frombuffer(pieces, dtype=self.dtype).reshape(self.shape)
        return array if self.table is None else BytePixels(data=array, table=self.table, shape=self.numbers)


class _InputsAway(ImageInputs):
    """Arrays that are read from a file whenever they are asked for."""

    def __init__(self, file: _File, places: Mapping[str, _Away]) -> None:
        self._file, self._places = file, dict(places)

    @property
    def held(self) -> Mapping[str, Held]:
        return {name: place.read(self._file) for name, place in self._places.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Spool:
    """Where the pixels of one shard's samples wait; the file is gone with the last of the samples."""

    def __init__(self, folder: Path | None) -> None:
        """Put away into a file in a folder; None: everything stays in memory."""
        self._folder = folder
        self._file: _File | None = None
        self._seen = self._end = 0

    def put_away(self, sample: EncodedSample) -> EncodedSample:
        """The sample, its arrays of pictures in the file if it is behind the first; in memory where there is no room."""
        if self._folder is None or not sample.image_inputs:
            return sample
        self._seen += 1
        if self._seen <= IN_MEMORY:
            return sample
        try:
            self._file = self._file or _File(self._folder)
            places = {name: self._write(self._file, held) for name, held in held_of(sample.image_inputs).items()}
        except OSError as error:
            _log.info("pixels of a shard stay in memory: %s", error.strerror or error)
            self._folder = None
            return sample
        return replace(sample, image_inputs=_InputsAway(self._file, places))

    def _write(self, file: _File, held: Held) -> _Away:
        array = held.data if isinstance(held, BytePixels) else held
        place, data = _Away(self._end, array.dtype, array.shape), memoryview(array.tobytes())
        while data:
            written = os.pwrite(file.descriptor, data, self._end)
            data, self._end = data[written:], self._end + written
        return replace(place, table=held.table, numbers=held.shape) if isinstance(held, BytePixels) else place

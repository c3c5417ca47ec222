"""Signals of the pictures alone are stored once per pictures and prefix, not once per conversation about them.

Visual rows see the tokens before the image and the image itself, never the text behind it. Conversations
about one picture, with the same words in front of it, therefore have the same ``visual_columns`` and
``visual_map``. Of such records in one shard the first, the **holder**, keeps these arrays; the others, its
followers, leave them empty. Every record says in ``visual_source`` (u4 [1]) at which position of the shard its
holder lies: its own if it is one, and never one behind it, so that a tar can be read in one pass.

Equal in theory, these signals differ by rounding when a teacher computes them in batches of other sizes and
lengths, whose sums are formed in another order (a random Llama of width 512, alone or in a batch of four: by up
to 4e-7 in float32 and 3e-3 in bfloat16, the largest mass being 0.3). What all conversations about an image get is
the *holder's* numbers, bit for bit: those of the first conversation in stored order.

Of several pictures or frames the prefix reaches to the last visual token: records share where the same pictures stand
between the same words, frames at the same times, and nothing else in front.

Caches without ``visual_source`` hold all arrays in every record, and are still read. No torch in here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from vlm_distill_cache.common.cache.schema import MAP_AXES, Field, Record
from vlm_distill_cache.common.cache.stores.base import ShardReader
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.hashing import checksum

VISUAL_SOURCE = Field(name="visual_source", dtype="u4", axis="sample")

_REMEDY = "run `cachectl verify --deep`, then build or copy that shard again"


def with_visual_source(fields: Mapping[str, tuple[Field, ...]]) -> dict[str, tuple[Field, ...]]:
    """Give the fields of a new plan the one that shares images, if any of its signals is of the image alone.

    Args:
        fields: By signal, with or without ``visual_source``; a derived cache may have lost, with a signal,
            the group that it stood in.

    Returns:
        The same, ``visual_source`` last in the first such signal's group, by name.
    """
    bare = {name: tuple(f for f in group if f != VISUAL_SOURCE) for name, group in fields.items()}
    of_images = sorted(name for name, group in bare.items() if any(f.axis in MAP_AXES for f in group))
    for name in of_images[:1]:
        bare[name] = (*bare[name], VISUAL_SOURCE)
    return bare


_OF_IMAGES = (
    "image_hash",
    "tiles",
    "tile_pictures",
    "frame_times",
)  # base fields that are equal in records which share


def prefix_key(image_hash: bytes, prefix_ids: np.ndarray, frame_times: Sequence[tuple[int, float]] = ()) -> str:
    """Name what visual rows can see: records with equal keys, 32 hexadecimal digits, may share their arrays.

    Args:
        image_hash: xxh3_128 of each picture, 16 bytes each.
        prefix_ids: Ids of the tokens up to and including the last visual one, integers ``[T']``.
        frame_times: Of each picture, as ``frame_times`` of a record; empty without a video. Some families turn them into
            positions, which no token shows.
    """
    times = np.array(frame_times, dtype="<f4").tobytes()
    return checksum(image_hash + times + np.ascontiguousarray(prefix_ids, dtype="<i8").tobytes())


class SharedImages:
    """How the records of one plan share their images' arrays.

    Attributes:
        fields: What is shared; empty if the plan's records share nothing.
    """

    def __init__(self, fields: Iterable[Field]) -> None:
        fields = tuple(fields)
        shares = any(field.name == VISUAL_SOURCE.name for field in fields)
        self.fields = tuple(field for field in fields if shares and field.axis in MAP_AXES)
        self.names = frozenset(field.name for field in self.fields)
        self._guards = frozenset(field.name for field in fields if field.name in _OF_IMAGES)

    def content_key(self, record: Record) -> str | None:
        """Name the arrays themselves, where the tokens in front of the image are not known any more.

        Returns:
            32 hexadecimal digits; None without an image.
        """
        if not len(record["tiles"]):
            return None
        parts = [record[name].tobytes() for name in _OF_IMAGES if name != "tiles" and name in record]
        for field in self.fields:
            array = np.ascontiguousarray(record[field.name])
            parts += [f"{field.name} {array.shape}".encode(), array.tobytes()]
        return checksum(b"".join(parts))

    def read(self, reader: ShardReader, position: int, names: Collection[str] | None = None, *, where: str) -> Record:
        """Read a record with its image's arrays, wherever in the shard they lie.

        Returns:
            The record; its ``visual_source``, if asked for, is the stored one.

        Raises:
            CacheFormatError: If the holder is no record of this shard, no holder, or of another image.
        """
        wanted = self.names if names is None else self.names & set(names)
        if not wanted:
            return reader.read(position, names)
        guards = {VISUAL_SOURCE.name, *self._guards}
        record = reader.read(position, None if names is None else guards | set(names))
        source = int(record[VISUAL_SOURCE.name][0])
        if source != position:
            if source > position:
                raise CacheFormatError(f"{where}: {_reversed(position, source)}; {_REMEDY}")
            holder = reader.read(source, guards | wanted)
            # One array of several may be empty by right; none of them may.
            complete = wanted if wanted == self.names else ()
            if (wrong := _holder_fault(position, record, source, holder, complete)) is not None:
                raise CacheFormatError(f"{where}: {wrong}; {_REMEDY}")
            record |= {name: holder[name] for name in wanted}
        return record if names is None else {name: record[name] for name in record if name in names}


class ImageSharer:
    """Decides, for the records of one shard in stored order, which keep their image's arrays."""

    def __init__(self, shared: SharedImages) -> None:
        self._fields = shared.fields
        self._holders: dict[str, int] = {}
        self._count = 0

    def share(self, record: Record, key: str | None) -> Record:
        """Take the arrays out of a record whose image an earlier record holds.

        Args:
            record: With its image's arrays; the next one to be appended to the shard.
            key: From `prefix_key` or `SharedImages.content_key`; None without an image.

        Returns:
            The record to append, with ``visual_source``; unchanged if the plan does not share.
        """
        position = self._count
        self._count += 1
        if not self._fields:
            return record
        source = position if key is None else self._holders.setdefault(key, position)
        shared = {VISUAL_SOURCE.name: np.array([source], dtype=VISUAL_SOURCE.numpy_dtype)}
        if source != position:
            shared |= {field.name: field.empty() for field in self._fields}
        return {**record, **shared}


class SourceCheck:
    """Checks ``visual_source`` of all records of one shard, in stored order and one pass."""

    def __init__(self, shared: SharedImages) -> None:
        self._names = shared.names
        self._holders: dict[int, Record] = {}

    def damage(self, position: int, record: Record) -> str | None:
        """Return what is wrong with the next record as stored, or None."""
        if not self._names:
            return None
        source = int(record[VISUAL_SOURCE.name][0])
        empty = not any(len(record[name]) for name in self._names)
        if source == position:
            if len(record["tiles"]) and empty:
                return "visual_source names the record itself, which has an image but no arrays of it"
            # Lengths will do from here on: a shard's maps do not fit into memory twice.
            kept = {name: np.empty(min(len(record[name]), 1)) for name in self._names}
            self._holders[position] = {
                **kept,
                **{name: record[name] for name in (*_OF_IMAGES, VISUAL_SOURCE.name) if name in record},
            }
            return None
        if source > position:
            return _reversed(position, source)
        if not empty:
            return f"visual_source is {source}, but record {position} has arrays of its own"
        if source not in self._holders:
            return f"visual_source is {source}, which follows another record"
        return _holder_fault(position, record, source, self._holders[source], self._names)


def _reversed(position: int, source: int) -> str:
    return f"visual_source is {source}, beyond the record itself (position {position})"


def _holder_fault(position: int, record: Record, source: int, holder: Record, names: Collection[str]) -> str | None:
    """What is wrong with the record that another one names as its holder."""
    if int(holder[VISUAL_SOURCE.name][0]) != source:
        return f"visual_source is {source}, which follows another record"
    if names and not any(len(holder[name]) for name in names):
        return f"visual_source is {source}, a record without arrays of an image"
    for name in (name for name in _OF_IMAGES if name in record):
        if record[name].tobytes() != holder[name].tobytes():
            return f"visual_source of record {position} is {source}, a record of another image ({name} differs)"
    return None

"""THE record: what a cache holds of one sample, and which position every number belongs to.

A record is a dict of named plain numpy arrays: no objects, no structured dtypes, nothing pickled. The
first axis of each array is ragged over samples and carries a name; the other axes are fixed for a whole
cache. The sample id is not inside the record, it travels beside it.

========== ==================================================== =============================
axis       one entry per                                        length
========== ==================================================== =============================
``row``    supervised row, in sequence order                    A
``entry``  kept token of a supervised row, rows concatenated    E = sum of ``entry_count``
``text``   text row behind the visual tokens, sequence order    X, answer rows included; 0 without any
``visual`` visual token of the teacher, in sequence order       N
``pair``   lower triangle of the visual map, row-major          N (N + 1) / 2; of several views the sum
``map``    visual map kept with a scale of its own              one for each view, 0 without an image
``cell``   row, and column, of that map                         N, or cells of the pooled map
``square`` pair of cells of a pooled map, row-major             cells squared
``mask``   byte of that map's packed mask                       groups * ceil(pairs / 8)
``code``   coded value of that map, groups concatenated         as the mask says
``visual_entry`` kept token of a visual row, rows concatenated  sum of ``visual_entry_count``
``byte``   byte of the answers' text                            as long as the text
``tile``   visual tile of the sample's images                   number of tiles
``picture`` picture of the sample, frames of videos among them  P; 0 for text alone
``placed`` visual tile, where there are several pictures        number of tiles; 0 with one picture or none
``timed``  picture, where any is a frame                        P; 0 without a video
``look``   supervised row and still picture, rows outermost     A times still pictures
``frame_look`` supervised row and view of frames                A times views
``text_look``, ``text_frame_look`` the same of text rows        X times pictures, or views
``sample`` the sample itself                                    exactly 1
========== ==================================================== =============================

**Position convention.** Row p of a causal language model is the distribution that predicts token p + 1.
Labels are shifted once, when a sample is encoded: ``labels[p]`` is the *target of row p*, and rows without
a target hold ``IGNORE_INDEX``. A record keeps only the supervised rows, so L answer tokens (the
end-of-answer token included) give exactly A = L rows, and ``labels`` of a record are the answer's tokens.
For the six tokens ``<s> USER: hi ASSISTANT: yes </s>`` the encoded sample's labels are
``[-100, -100, -100, yes, </s>, -100]`` and the record's are ``[yes, </s>]``, predicted by rows 3 and 4.
A one-token answer thus keeps its row, and the distribution *after* the last answer token is not kept.

**Versions.** Version 1 keeps one picture a sample, version 2 several and frames of videos; both are read, and 2 is written
only where a sample has more than one picture. The axes from ``picture`` on are those of version 2. A **view** is what a
model's visual tokens show together: a picture, or a few frames.

Fields that every record of version 1 has: ``image_hash`` u1 [1, 16] (xxh3_128 of size and RGB pixels, zeros without an
image), ``labels`` u4 [A], ``tiles`` f4 [tiles, 6] (rows, cols, x0, y0, x1, y1 in units of the original
image; beyond [0, 1] is padding). In version 2 ``image_hash`` is u1 [P, 16], ``tile_pictures`` u2 [tiles or 0, 2] says of
each tile the first picture that it shows and how many, and ``frame_times`` f4 [P or 0, 2] of which of the sample's media
each picture is a frame, and at which second (-1 and NaN of a still picture). Each signal's codec adds its own
(``common.codecs``). ``visual_columns`` are means over the visual rows that carry image: those of tokens mostly in padding
do not count.

What the values mean, for whoever reads a shard with other tools: ``docs/cache-format.md``.

What depends on the image alone (``MAP_AXES``) is held by one record a shard and image; ``visual_source`` u4 [1]
says by which, and in the others these arrays are empty (``common.cache.shared_images``).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.rules import check, items, one_of, record, text, whole

if TYPE_CHECKING:  # command lines start without it
    import numpy as np

FORMAT_VERSION = 2
"""The newest that this code reads."""
ONE_PICTURE, SEVERAL_PICTURES = 1, 2
"""The versions of caches whose samples have one picture at most, or any number."""
IGNORE_INDEX = -100

DTYPES = ("u1", "u2", "u4", "i8", "f2", "f4")
AXES = ("row", "entry", "text", "visual", "pair", "map", "cell", "square", "mask", "code", "byte",
        "visual_entry", "tile", "sample",
        "picture", "placed", "timed", "look", "frame_look", "text_look", "text_frame_look")  # fmt: skip
MAP_AXES = ("visual", "visual_entry", "pair", "map", "cell", "square", "mask", "code")
"""Axes of signals that depend on the image alone; all are empty without one."""
MAX_TRAILING_ELEMENTS = 1 << 24  # of one row of one field; a cache that declares more is not believed

Record = dict[str, "np.ndarray"]


@functools.cache
def _numpy_dtype(name: str) -> np.dtype:
    import numpy as np

    return np.dtype("<" + name)


_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Field:
    """One named array of a record.

    Attributes:
        name: Lower-case identifier; ``sample_ids`` and names ending in ``_offsets`` are the stores' own.
        dtype: One of ``DTYPES``, always little-endian.
        axis: What the ragged first axis counts, one of ``AXES``.
    """

    name: str
    dtype: str
    axis: str
    trailing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise CacheFormatError(f"field name {self.name!r}: expected lower-case letters, digits and '_'")
        if self.name == "sample_ids" or self.name.endswith("_offsets"):
            raise CacheFormatError(f"field name {self.name!r} is reserved for the stores; choose another")
        if self.dtype not in DTYPES:
            raise CacheFormatError(f"field {self.name}: dtype {self.dtype!r}; expected one of {DTYPES}")
        if self.axis not in AXES:
            raise CacheFormatError(f"field {self.name}: axis {self.axis!r}; expected one of {AXES}")
        sizes_ok = isinstance(self.trailing, tuple) and all(
            isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in self.trailing
        )
        if not sizes_ok or len(self.trailing) > 8:
            raise CacheFormatError(f"field {self.name}: trailing shape {self.trailing!r} is not a shape")
        elements = math.prod(self.trailing)
        if elements > MAX_TRAILING_ELEMENTS:
            raise CacheFormatError(
                f"field {self.name}: trailing shape {self.trailing} has {elements} elements, "
                f"more than the {MAX_TRAILING_ELEMENTS} a cache may declare"
            )

    @property
    def numpy_dtype(self) -> np.dtype:
        """The little-endian numpy dtype."""
        return _numpy_dtype(self.dtype)

    def empty(self) -> np.ndarray:
        """Return an array of this field with first axis 0."""
        import numpy as np

        return np.zeros((0, *self.trailing), dtype=self.numpy_dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON stored in plan.json."""
        return {"name": self.name, "dtype": self.dtype, "axis": self.axis, "trailing": list(self.trailing)}

    @classmethod
    def from_dict(cls, data: Any) -> Field:
        """Read what ``to_dict`` wrote."""
        check(data, FIELD, "field")
        return cls(**data | {"trailing": tuple(data["trailing"])})


FIELD = record(
    {
        "name": text(64, least=1),
        "dtype": one_of(*DTYPES),
        "axis": one_of(*AXES),
        "trailing": items(whole(1, MAX_TRAILING_ELEMENTS), most=8),
    }
)
"""What a plan says of a field."""


BASE_FIELDS = (
    Field(name="image_hash", dtype="u1", axis="sample", trailing=(16,)),
    Field(name="labels", dtype="u4", axis="row"),
    Field(name="tiles", dtype="f4", axis="tile", trailing=(6,)),
)


SEVERAL_FIELDS = (
    Field(name="image_hash", dtype="u1", axis="picture", trailing=(16,)),
    *BASE_FIELDS[1:],
    Field(name="tile_pictures", dtype="u2", axis="placed", trailing=(2,)),
    Field(name="frame_times", dtype="f4", axis="timed", trailing=(2,)),
)


def base_fields(version: int) -> tuple[Field, ...]:
    """The fields that every record of a format version has."""
    return BASE_FIELDS if version == ONE_PICTURE else SEVERAL_FIELDS


def version_of(fields: Iterable[Field]) -> int:
    """The format version of records with these fields."""
    return SEVERAL_PICTURES if set(SEVERAL_FIELDS) <= set(fields) else ONE_PICTURE


def check_fields(fields: Sequence[Field]) -> None:
    """Refuse a set of fields in which a name appears twice."""
    seen: set[str] = set()
    for field in fields:
        if field.name in seen:
            raise CacheFormatError(f"field {field.name} appears twice; each signal needs names of its own")
        seen.add(field.name)


def check_record(record: Record, fields: Sequence[Field], where: str = "record") -> None:
    """Refuse a record that does not have exactly these fields, dtypes and matching lengths."""
    import numpy as np

    names = {field.name for field in fields}
    if record.keys() != names:
        missing, extra = sorted(names - record.keys()), sorted(record.keys() - names)
        raise CacheFormatError(
            f"{where}: missing fields {missing}, unexpected fields {extra}; "
            "encode it with the codecs that plan.json names"
        )
    lengths: dict[str, tuple[int, str]] = {}  # axis -> (length, the field that set it)
    for field in fields:
        array = record[field.name]
        if not isinstance(array, np.ndarray) or array.dtype != field.numpy_dtype:
            found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise CacheFormatError(f"{where}: {field.name} has dtype {found}; expected {field.dtype}")
        if array.ndim != 1 + len(field.trailing) or array.shape[1:] != field.trailing:
            raise CacheFormatError(
                f"{where}: {field.name} has shape {array.shape}; "
                f"expected ({field.axis}, {', '.join(map(str, field.trailing))})"
            )
        length, first = lengths.setdefault(field.axis, (len(array), field.name))
        if length != len(array):
            raise CacheFormatError(
                f"{where}: {field.name} has {len(array)} along its {field.axis} axis, {first} has {length}"
            )
    check_lengths(record, lengths, where)


def check_lengths(record: Record, lengths: Mapping[str, tuple[int, str]], where: str) -> None:
    """Refuse a record whose axes do not fit each other; ``lengths``: of each axis, and the field that has it."""
    import numpy as np

    samples, name = lengths.get("sample", (1, ""))
    if samples != 1:
        raise CacheFormatError(f"{where}: {name} has {samples} along its sample axis; expected 1")
    for axis, counts in (("entry", "entry_count"), ("visual_entry", "visual_entry_count")):
        if axis in lengths and counts in record:
            found, name = lengths[axis]
            expected = int(np.add.reduce(record[counts], dtype="i8"))
            if found != expected:
                raise CacheFormatError(f"{where}: {name} has {found} entries, but {counts} sums to {expected}")
    if "pair" in lengths and not len(record.get("tile_pictures", ())):  # else each view has pairs of its own
        pairs, name = lengths["pair"]
        visual = lengths["visual"][0] if "visual" in lengths else (int((8 * pairs + 1) ** 0.5) - 1) // 2
        if pairs != visual * (visual + 1) // 2:
            raise CacheFormatError(
                f"{where}: {name} has {pairs} pairs, which is not N(N+1)/2 for N={visual} visual tokens"
            )

"""What a safetensors file says that it holds, read and compared with the file before anything believes it."""

from __future__ import annotations

import math
from pathlib import Path

from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import parse_json
from vlm_distill_cache.common.files.rules import AGAIN, OBJECT, check, entries, items, one_of, record, text, whole

MAX_HEADER_BYTES = 8 << 20  # one of 30,000 tensors has 4 MB
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a value by its kind; weights have no other."""
_SIZE = whole(0, 1 << 40)
_TENSOR = record(
    {"dtype": one_of(*ITEM_BYTES), "shape": items(_SIZE, most=8), "data_offsets": items(_SIZE, least=2, most=2)}
)
_METADATA = "__metadata__"


def read_tensor_table(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the header of a safetensors file of weights.

    Returns:
        The shape of each tensor, by name; its values are in the file, without a gap or an overlap.

    Raises:
        CacheFormatError: If the file is no such file, or cut, or its header is too long, or says what is not there.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CacheFormatError(
                    f"{path}: says that its header has {length} bytes; expected at most {MAX_HEADER_BYTES}, in a file of "
                    f"{size}; {AGAIN}"
                )
            data = file.read(length)
    except OSError as error:
        raise CacheFormatError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from error
    header = dict(check(parse_json(data, str(path)), OBJECT, str(path)))
    check(header.pop(_METADATA, {}), entries(text(1 << 20), most=1000), f"{path}: {_METADATA}")
    check(header, entries(_TENSOR, most=100_000), str(path))
    end = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begins, ends = tensor["data_offsets"]
        expected = [end, end + math.prod(tensor["shape"]) * ITEM_BYTES[tensor["dtype"]]]
        if [begins, ends] != expected:
            raise CacheFormatError(
                f"{path}: {name[:80]!r} lies at {[begins, ends]}; expected {expected} by its shape and the tensors before it; "
                f"{AGAIN}"
            )
        end = ends
    if end != size - 8 - length:
        raise CacheFormatError(f"{path}: has {size - 8 - length} bytes of values, its header describes {end}; {AGAIN}")
    return {name: tuple(tensor["shape"]) for name, tensor in header.items()}

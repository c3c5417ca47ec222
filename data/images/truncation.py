"""Whether a video file ends before it says that it does: FFmpeg decodes what there is of a broken download."""

import io
from typing import IO

_MOST_BOXES = 100_000
_FILLED = frozenset({b"mdat", b"moov"})  # of others, players do not mind an end too far away
_ASF, _ASF_PROPERTIES = (
    bytes.fromhex(name) for name in ("3026b2758e66cf11a6d900aa0062ce6c", "a1dcab8c47a9cf118ee400c00c205365")
)
_ASF_IS_SENT = 1  # a flag: it was written without knowing its end
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def stated_size(file: IO[bytes]) -> int:
    """Bytes up to which an mp4 (mov), webm (mkv), avi or wmv says that it goes; 0 where nothing tells.

    Args:
        file: Seekable; read at its beginnings of boxes alone, and left anywhere.
    """
    file.seek(0)
    head = file.read(12)
    if head.startswith(_EBML):
        return _stated_by_matroska(file)
    if head == _ASF[:12]:
        return _stated_by_asf(file)
    if head[:4] == b"RIFF" and head[8:] == b"AVI ":
        return 8 + int.from_bytes(head[4:8], "little")
    return _stated_by_boxes(file) if head[4:8] in _FILLED | {b"ftyp", b"wide", b"free", b"skip"} else 0


def _stated_by_boxes(file: IO[bytes]) -> int:
    end = file.seek(0, io.SEEK_END)
    start = stated = 0
    for _ in range(_MOST_BOXES):
        if start > end - 8:
            break
        file.seek(start)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        size = int.from_bytes(head[8:], "big") if size == 1 else size
        if size < 8:  # 0: to the end of the file, whatever that is
            break
        start += size
        stated = start if kind in _FILLED else stated
    return stated


def _stated_by_matroska(file: IO[bytes]) -> int:
    start = 0
    for wanted in (_EBML, _SEGMENT):
        file.seek(start)
        if file.read(4) != wanted:
            return 0
        first = file.read(1)
        length = 9 - first[0].bit_length() if first and first[0] else 0  # bytes of the size, by its leading zeros
        if not length:
            return 0
        size = int.from_bytes(first + file.read(length - 1), "big") & ((1 << 7 * length) - 1)
        if size == (1 << 7 * length) - 1:  # not known when it was written
            return 0
        start += 4 + length + size
    return start


def _stated_by_asf(file: IO[bytes]) -> int:
    file.seek(0)
    header = file.read(30)
    start, end = 30, int.from_bytes(header[16:24], "little")
    for _ in range(_MOST_BOXES):
        if start + 24 > end:
            break
        file.seek(start)
        found = file.read(92)
        size = int.from_bytes(found[16:24], "little")
        if found[:16] == _ASF_PROPERTIES and len(found) == 92:
            is_sent = int.from_bytes(found[88:92], "little") & _ASF_IS_SENT
            return 0 if is_sent else int.from_bytes(found[40:48], "little")
        if size < 24:
            break
        start += size
    return 0

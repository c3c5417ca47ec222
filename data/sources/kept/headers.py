"""The members of a tar, from its headers alone.

`tarfile` makes an object of 40 attributes and checks a sum in Python for each member: 60 us. What nearly all archives
consist of (plain files and folders with short names, and the times that Python's writers put before each) is read here
in a tenth of that, and the sums are checked with numpy. Whatever else an archive holds, or whatever is wrong with it, is
`tarfile`'s: such an archive is read again by it, from the beginning.
"""

import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np

from vlm_distill_cache.common.errors import DataError, TransferError
from vlm_distill_cache.common.remotes.copies import RemoteFile

Archive: TypeAlias = Path | RemoteFile
BLOCK = 512
COPY = "copy or download it again"
_SUMMED_AT_A_TIME = 4096  # headers
_READ_AT_A_TIME = 8 * BLOCK  # bytes: headers of small members lie close together
_LABELS = (b"V", b"D", b"M", b"N")  # of a volume, of a folder in an incremental archive
_TIMES = re.compile(rb"(?:\d+ [acm]time=[\d.-]+\n)+")
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Member(NamedTuple):
    """A member: its name, and where its bytes lie, or (``problem``) why they cannot be read."""

    name: str
    offset: int
    size: int
    problem: str = ""


def read_members(path: Archive) -> list[Member]:
    """The members of an uncompressed archive, folders left out, in order.

    Raises:
        DataError: It is none, is cut off, or goes on behind its end.
    """
    try:
        with path.open("rb") as file:
            descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
            plain = plain_members(lambda at: os.pread(descriptor, _READ_AT_A_TIME, at), size)
            if plain is None:
                return _read_file(file, path)
            members, end = plain
            _refuse_cut(file, end, path)
            return members
    except TransferError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar: {error}; {COPY}") from error


def _read_file(file: BinaryIO, path: Archive) -> list[Member]:
    packed = file.read(6).startswith(_PACKED)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            infos, end = list(tar), tar.offset
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        remedy = "it is compressed: unpack .tar.gz first" if packed else COPY
        raise DataError(f"{path} cannot be read as an uncompressed tar: {error}; {remedy}") from error
    _refuse_cut(file, end, path)
    return _members_of(path.name, infos)


def plain_members(read: Callable[[int], bytes], size: int) -> tuple[list[Member], int] | None:
    """The members of an archive of plain files, and where its end mark begins; None: `tarfile` is to look at it.

    Args:
        read: Some bytes of the archive from a place on; at least a block, but at its end.
        size: Bytes of the archive.
    """
    found: list[Member] = []
    unsummed = bytearray()
    here, begin, at, behind_times = b"", 0, 0, False
    while at + BLOCK <= size:
        if not begin <= at <= begin + len(here) - BLOCK:
            here, begin = read(at), at
        block = here[at - begin : at - begin + BLOCK]
        if len(block) < BLOCK:
            return None
        if not block[0]:
            return None if behind_times or block.strip(b"\0") or not _sums_fit(unsummed) else (found, at)
        number, kind = block[124:136].rstrip(b" \0"), block[156:157]
        if not number.isdigit() or block[345]:
            return None
        try:
            length, name = int(number, 8), block[:100].partition(b"\0")[0].decode("ascii")
        except ValueError:
            return None
        unsummed += block
        if len(unsummed) >= _SUMMED_AT_A_TIME * BLOCK:
            if not _sums_fit(unsummed):
                return None
            unsummed.clear()
        start = at + BLOCK
        at = start + -(-length // BLOCK) * BLOCK
        if at > size:
            return None
        if kind in (b"0", b"\0") and not name.endswith("/"):
            found.append(Member(name, start, length))
        elif kind == b"x" and length <= BLOCK:
            if start + length > begin + len(here):
                here, begin = read(start), start
            if not _TIMES.fullmatch(here[start - begin : start - begin + length]):
                return None
        elif kind != b"5" or length:
            return None
        behind_times = kind == b"x"
    return None


def _sums_fit(headers: bytearray) -> bool:
    """Whether each header holds the sum of its own bytes, as eight of them say, which count as blanks."""
    blocks = np.frombuffer(bytes(headers), dtype=np.uint8).reshape(-1, BLOCK)
    digits = blocks[:, 148:154].astype(np.int64) - ord("0")
    if ((digits < 0) | (digits > 7)).any():
        return False
    stated = digits @ (8 ** np.arange(5, -1, -1))
    summed = blocks.sum(axis=1, dtype=np.int64) - blocks[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    return bool((stated == summed).all())


def _refuse_cut(file: BinaryIO, end: int, path: Archive) -> None:
    """Refuse an archive whose members end at byte ``end`` without the blocks of zeros that close one.

    `tarfile` takes a header that is cut off or damaged for the end, and so does one behind which another archive
    follows.
    """
    file.seek(end)
    block = file.read(BLOCK)
    if block.strip(b"\0") or len(block) < BLOCK:
        raise DataError(
            f"{path} is cut off or damaged at byte {end}: its end mark is missing; {COPY} (one that "
            "a program wrote may not have been closed)"
        )
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise DataError(
                f"{path} goes on behind its end mark at byte {end}: several archives in one file, or damage; keep them "
                "as files of their own (tar --concatenate joins two)"
            )


def _members_of(archive: str, infos: Sequence[tarfile.TarInfo]) -> list[Member]:
    """What `tarfile` found, links followed inside the archive."""
    has_links = any(info.islnk() or info.issym() for info in infos)
    files = {posixpath.normpath(info.name): info for info in infos} if has_links else {}
    found: list[Member] = []
    for info in infos:
        if info.isdir() or info.type in _LABELS:
            continue
        target = _target_of(info, files) if has_links else info
        problem = ""
        if target.islnk() or target.issym():
            problem = f"{archive}:{info.name} is a link to {target.linkname[:100]!r}, which is not in the archive"
        elif not target.isreg() or target.issparse():
            problem = f"{archive}:{info.name} is no ordinary file; expected pictures and texts"
        found.append(Member(info.name, target.offset_data, target.size, problem))
    return found


def _target_of(info: tarfile.TarInfo, files: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """The file that a member stands for; a link, if it leads out of the archive or in a circle."""
    seen = {info.name}
    while info.islnk() or info.issym():
        folder = "" if info.islnk() else posixpath.dirname(info.name)
        name = posixpath.normpath(posixpath.join(folder, info.linkname))
        if name not in files or name in seen:
            break
        seen.add(name)
        info = files[name]
    return info

"""WebDataset tars of image + JSON, read in any order without unpacking.

The library streams tars front to back; a teacher cache needs sample number 31,415 again after a
resume. So the members' offsets are listed once (headers only: a 1 GB tar takes a fraction of a second)
and each sample is two short reads. The library still expands brace patterns and splits keys, so that
``{000..099}.tar`` and ``a/b.c.jpg`` mean what they mean everywhere else.
"""

import glob
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.images.load import FileSlice
from vlm_distill_cache.data.sample import ImageSource, Turn, refuse_repeats
from vlm_distill_cache.data.sources.llava import EntryDataset
from vlm_distill_cache.data.sources.messages import parse_record

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


@dataclass
class _Member:
    """Where the parts of one sample lie."""

    key: str
    texts: dict[str, FileSlice] = field(default_factory=dict)
    images: list[FileSlice] = field(default_factory=list)


class WebDataset(EntryDataset):
    """Samples of a tar, a folder of tars, a glob or a brace pattern; the id is the WebDataset key."""

    def __init__(self, pattern: str) -> None:
        self.name = Path(pattern).name
        paths = find_tars(pattern)
        self._members = [member for path in paths for member in _index_tar(path)]
        if not self._members:
            raise DataError(f"{pattern}: no member KEY.json or KEY.txt in {len(paths)} tars; nothing to learn from")
        self.sample_ids: Sequence[str] = refuse_repeats([member.key for member in self._members], where=pattern)

    def read(self, index: int) -> tuple[Mapping[str, Any], tuple[Turn, ...], tuple[ImageSource, ...]]:
        """The entry at ``index``, its turns and its images."""
        member = self._members[index]
        record = _read_record(member)
        return record, parse_record(record)[0], tuple(member.images)


def find_tars(pattern: str) -> list[Path]:
    """Expand a folder, glob or brace pattern to tars, sorted within each part."""
    from webdataset.shardlists import expand_urls  # imports a whole loader, only needed here

    folder = Path(pattern)
    paths = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    for part in [] if folder.is_dir() else expand_urls(pattern):
        paths += [Path(match) for match in sorted(glob.glob(part))] or [Path(part)]  # noqa: PTH207 - absolute too
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise DataError(f"no tar at {', '.join(missing[:3]) or pattern}; give a tar, a folder of tars or a pattern")
    return paths


def _index_tar(path: Path) -> list[_Member]:
    from webdataset.tariterators import base_plus_ext

    members: dict[str, _Member] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                key, extension = base_plus_ext(info.name)
                if not info.isfile() or not key:
                    continue
                part = FileSlice(path, info.offset_data, info.size, f"{path.name}:{info.name}")
                member = members.setdefault(key, _Member(key=key))
                kind = extension.lower()
                if kind in ("json", "txt"):
                    member.texts[kind] = part
                elif kind.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS:
                    member.images.append(part)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as an uncompressed tar: {error}; unpack .tar.gz first, or download it again"
        ) from error
    return [member for member in members.values() if member.texts]


def _read_record(member: _Member) -> dict[str, Any]:
    if "json" not in member.texts:
        return {"caption": _decode(member.texts["txt"])}
    part = member.texts["json"]
    try:
        record = json.loads(_decode(part))
    except json.JSONDecodeError as error:
        raise SampleError(f"{part.name} is not JSON: {error}") from error
    if isinstance(record, list):  # some tars hold the bare conversation
        return {"conversations": record}
    if not isinstance(record, dict):
        raise SampleError(f"{part.name}: expected an object, got {type(record).__name__}")
    return record


def _decode(part: FileSlice) -> str:
    try:
        return part.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"{part.name} is not UTF-8: {error}") from error

"""Several files by one name: a folder, a glob (``*.tar``) or a brace pattern (``{000..099}.tar``); parts of one set."""

import glob
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.hub import HubName, hub_name

FILE_ENDINGS = tuple(".json .jsonl .ndjson .csv .tsv .yaml .yml .txt .zip .gz .tar .parquet .arrow".split())  # noqa: SIM905
"""What ends in one of these is meant as a file, never as a name of the hub."""
KIND_OF_ENDING = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
"""Files of data, by the ending of their name: which reader takes them."""
UNFINISHED = "finish the download, or name the files that are meant"
"""What to do where files of a numbered set are missing."""
_PATTERN = re.compile(r"[*?\[{]")
_UNKNOWN_COUNT = re.compile(r"[*?]")  # a pattern that says of how many files it is does not have these
_OF = re.compile(r"(.*?)(\d+)([-_]of[-_])(\d+)(.*)")
_HASH = re.compile(r"-[0-9a-f]{16}(?=\.|$)")  # of its content, in the name of a part
_COUNTED = re.compile(r"(part|shard|chunk|split|batch|file|piece|block)s?[-_. ]?$", re.IGNORECASE)
_OF_REPOSITORY = re.compile(r"([^/@]+/[^/@]+)(@refs/[^/@]+/[^/@]+|@[^/@]+)?/(.+)")


def find_files(pattern: str, extension: str) -> list[Path]:
    """Expand a folder, glob or brace pattern to files, sorted within each part.

    Raises:
        DataError: There is none, one that is named is not there, or a glob or folder lacks one of a numbered set.
    """
    from webdataset.shardlists import expand_urls  # imports a whole loader, only needed here

    folder = Path(pattern)
    paths = sorted(folder.glob(f"*{extension}")) if folder.is_dir() else []
    found = [str(path) for path in paths]
    for part in [] if folder.is_dir() else expand_urls(pattern):
        matches = sorted(glob.glob(part))  # noqa: PTH207 - absolute too
        found += matches if _UNKNOWN_COUNT.search(part) else []
        paths += [Path(match) for match in matches] or [Path(part)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        kind = extension.removeprefix(".")
        one = "a tar, a folder of tars" if kind == "tar" else f"a .{kind} file, a folder of them"
        raise DataError(f"no {kind} at {', '.join(missing[:3]) or pattern}; give {one} or a pattern")
    refuse_gaps(found, pattern)
    return paths


def is_pattern(name: str) -> bool:
    """Whether a name stands for several files."""
    return bool(_PATTERN.search(name))


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Those of some paths that a glob or brace pattern means, sorted within each part; ``*`` stops at a slash."""
    from webdataset.shardlists import expand_urls

    listed = [PurePosixPath(path) for path in sorted(paths)]
    found: list[str] = []
    for part in map(PurePosixPath, expand_urls(pattern)):
        same = [path for path in listed if len(path.parts) == len(part.parts)]
        found += [str(path) for path in same if path == part] or [str(path) for path in same if path.match(str(part))]
    return found


def file_of_repository(given: str, folder: Path) -> tuple[HubName, str] | None:
    """Read ``ORG/NAME[@REVISION]/FILE``, also with a pattern as file; None for what is no file in a repository.

    Args:
        folder: Where a path would start; where it holds a folder ``ORG``, a path is meant.
    """
    found = _OF_REPOSITORY.fullmatch(given)
    name = None if found is None else hub_name(f"{found[1]}{found[2] or ''}")
    if found is None or name is None or PurePosixPath(given).suffix.lower() not in KIND_OF_ENDING:
        return None
    strange = any(part in ("", ".", "..") for part in given.split("/"))
    return None if strange or (folder / given.partition("/")[0]).exists() else (name, found[3])


def refuse_gaps(paths: Iterable[str], where: str, *, remedy: str = UNFINISHED) -> None:
    """Refuse ``x-00000-of-00003`` without all of its kind, and beside ``x-00000-of-00002``: the same data once more.

    Raises:
        DataError: Half a download, or two of them in one folder.
    """
    sets: dict[tuple[str, str, str], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for path in paths:
        if found := _OF.fullmatch(path):
            sets[found[1], found[3], _HASH.sub("", found[5])][found[4]].add(int(found[2]))
    for (begin, of, end), counts in sets.items():
        if len(counts) > 1:
            listed = " and ".join(f"{begin}*{of}{count}{end}" for count in sorted(counts))
            raise DataError(
                f"{where} holds {listed}: data that were written twice, in another number of files; delete the older "
                "ones, or name the files that are meant"
            )
        for written, numbers in counts.items():
            count, first = int(written), int(int(written) in numbers and 0 not in numbers)
            missing = sorted(set(range(first, first + count)) - numbers) if 0 < count <= 99999 else []
            if missing:
                raise DataError(
                    f"{where}: {len(missing)} of {count} files are missing, the first is "
                    f"{begin}{missing[0]:0{len(written)}d}{of}{written}{end}; {remedy}"
                )


def are_parts(paths: Sequence[str]) -> bool:
    """Whether names say that files are parts of one set: they differ in a number alone, which counts from 0 or 1.

    It is padded with zeros (``x-00.json``), is all of the name (``0.json``), comes before an ``of`` or behind a word for
    a part (``part1.json``); ``stage1.json`` and ``stage2.json`` are two sets, as ``v1`` and ``v2`` are.
    """
    split = [re.split(r"(\d+)", _HASH.sub("", path)) for path in paths]
    if len({(len(tokens), *tokens[::2]) for tokens in split}) > 1:
        return False
    columns = list(zip(*split, strict=True))
    places = [place for place in range(1, len(columns), 2) if len(set(columns[place])) > 1]
    if len(places) != 1:
        return False
    written, (before, after) = columns[places[0]], (columns[places[0] - 1][0], columns[places[0] + 1][0])
    numbers = sorted(map(int, written))
    padded = len({len(number) for number in written}) == 1 and len(written[0]) > 1
    alone = not before or before.endswith("/")
    counted = padded or _COUNTED.search(before) or (alone and after.startswith(".")) or re.match(r"[-_]of[-_]", after)
    return bool(counted) and numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))

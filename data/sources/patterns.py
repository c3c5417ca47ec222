"""Several files by one name: a folder, a glob (``*.tar``) or a brace pattern (``{000..099}.tar``)."""

import glob
from pathlib import Path

from vlm_distill_cache.common.errors import DataError

FILE_ENDINGS = tuple(".json .jsonl .ndjson .csv .tsv .yaml .yml .txt .zip .gz .tar .parquet .arrow".split())  # noqa: SIM905
"""What ends in one of these is meant as a file, never as a name of the hub."""


def find_files(pattern: str, extension: str) -> list[Path]:
    """Expand a folder, glob or brace pattern to files, sorted within each part.

    Raises:
        DataError: There is none, or one that is named is not there.
    """
    from webdataset.shardlists import expand_urls  # imports a whole loader, only needed here

    folder = Path(pattern)
    paths = sorted(folder.glob(f"*{extension}")) if folder.is_dir() else []
    for part in [] if folder.is_dir() else expand_urls(pattern):
        paths += [Path(match) for match in sorted(glob.glob(part))] or [Path(part)]  # noqa: PTH207 - absolute too
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        kind = extension.removeprefix(".")
        one = "a tar, a folder of tars" if kind == "tar" else f"a .{kind} file, a folder of them"
        raise DataError(f"no {kind} at {', '.join(missing[:3]) or pattern}; give {one} or a pattern")
    return paths

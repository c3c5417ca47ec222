"""What ``--dry-run`` says: what a command would do, and all that stands in its way; it writes nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from vlm_distill_cache.common.errors import DistillError
from vlm_distill_cache.common.files.disk import disk_remedy
from vlm_distill_cache.common.files.notes import without_notes
from vlm_distill_cache.common.hub import without_downloads
from vlm_distill_cache.common.printing import message, one_line, size_words
from vlm_distill_cache.common.remotes.mirror import FOLDER_VARIABLE
from vlm_distill_cache.common.terminal.command_line import say, tell
from vlm_distill_cache.common.terminal.general import answer


@dataclass
class Outlook:
    """What would be done, a line each, and what stands in the way, each with its remedy."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    before: Mapping[str, Any] = field(default_factory=dict)  # the document of a look that was shown before
    written: str = ""  # what was asked for beside the looking

    def checking(self) -> _Checking:
        """Note an expected error of the block as a problem, and go on behind it."""
        return _Checking(self)

    def problem(self, text: str) -> None:
        """Note a problem once, however many checks meet it."""
        if text not in self.problems:
            self.problems.append(text)

    def needs_room(self, folder: Path, needed: int, what: str) -> None:
        """Say how much would be written; a disk without room for it is a problem."""
        free = free_bytes(folder)
        self.lines.append(f"  {what}: {size_words(needed)} to write, {size_words(free)} free")
        if needed > free:
            self.problem(
                f"{folder}: {what} takes {size_words(needed)}, and {size_words(free)} are free there; make room, or give "
                "another place"
            )

    def needs_writing(self, folder: Path) -> None:
        """A folder, or the nearest above one that is not there yet, that cannot be written is a problem."""
        place = _nearest(folder)
        if not place.is_dir():
            self.problem(f"{place} is a file; give a folder")
        elif not os.access(place, os.W_OK | os.X_OK):
            self.problem(f"{place}: cannot be written; change its owner or mode (chown, chmod), or give another place")

    def needs_package(self, name: str, *, extra: str, why: str) -> None:
        """A package that is not installed is a problem."""
        if importlib.util.find_spec(name) is None:
            self.problem(f"{why} needs {name}, which is not installed: run `pip install 'vlm-distill-cache[{extra}]'`")

    def show(self) -> None:
        """Print all of it.

        Raises:
            click.exceptions.Exit: With 1, if anything stands in the way.
        """
        lines, first = [line.strip() for line in self.lines], self.before
        answer(
            starts=not self.problems and bool(first.get("starts", True)),
            would=[*first.get("would", ()), *lines],
            problems=[*first.get("problems", ()), *self.problems],
        )
        for line in self.lines:
            say(line)
        for problem in self.problems:
            say(f"error: {message(problem)}", err=True)
        if self.problems:
            answer(error=message("; ".join(self.problems)))
        written = f"nothing was written but {self.written}" if self.written else "nothing was written"
        if self.problems:
            count = len(self.problems)
            say(f"It would not start: {count} problem{'s' * (count > 1)} above; {written}.", err=True)
            raise click.exceptions.Exit(1)
        tell(f"It would start; {written}.")


class _Checking:
    """The block of `Outlook.checking`."""

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, DistillError):
            self._outlook.problem(str(error))
        elif isinstance(error, OSError):
            place = f"{one_line(os.fsdecode(error.filename))}: " if isinstance(error.filename, str | bytes) else ""
            self._outlook.problem(f"{place}{error.strerror or error}{disk_remedy(error)}")
        else:
            return False
        return True


@contextmanager
def looking_only() -> Iterator[dict[str, int | None]]:
    """Fetch no weights and keep nothing that is fetched.

    Yields:
        Bytes of each model that would be downloaded, by name; None: not known.
    """
    before = os.environ.get(FOLDER_VARIABLE)
    with tempfile.TemporaryDirectory() as scratch, without_notes(), without_downloads(Path(scratch)) as missing:
        os.environ[FOLDER_VARIABLE] = f"{scratch}/caches"
        try:
            yield missing
        finally:
            os.environ.pop(FOLDER_VARIABLE)
            os.environ |= {} if before is None else {FOLDER_VARIABLE: before}


def download_lines(missing: dict[str, int | None]) -> list[str]:
    """A line for each model that would be downloaded."""
    return [
        f"  to download: {name}, {'of a size that is not known' if size is None else size_words(size)}"
        for name, size in missing.items()
    ]


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be."""
    return shutil.disk_usage(_nearest(folder)).free


def _nearest(folder: Path) -> Path:
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place

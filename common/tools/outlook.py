"""What ``--dry-run`` says: what a command would do, and all that stands in its way; it writes nothing."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml

from vlm_distill_cache.common.config import STAGES, ConfigT, read_yaml
from vlm_distill_cache.common.errors import ConfigError, DistillError
from vlm_distill_cache.common.files.disk import disk_words, free_bytes, nearest_there, refuse_no_disk
from vlm_distill_cache.common.files.notes import without_notes
from vlm_distill_cache.common.hub import without_downloads
from vlm_distill_cache.common.printing import message, size_words
from vlm_distill_cache.common.remotes.mirror import FOLDER_VARIABLE, mirror_settings
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
        place = nearest_there(folder)
        if not place.is_dir():
            self.problem(f"{place} is a file; give a folder")
        elif not os.access(place, os.W_OK | os.X_OK):
            self.problem(f"{place}: cannot be written; change its owner or mode (chown, chmod), or give another place")
        else:
            with self.checking():
                refuse_no_disk(place)

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


def resolve_each(
    outlook: Outlook,
    resolve: Callable[[Path | None, Sequence[str]], ConfigT],
    path: Path | None,
    given: Sequence[str],
) -> tuple[ConfigT | None, list[str]]:
    """A configuration from the options that can be used; each one that cannot is a problem.

    Args:
        resolve: From a YAML file and options ``a.b=c`` to a configuration.

    Returns:
        The configuration, None if the fault is no single option's; and the options that were left out, as ``a.b=c``.
    """
    sound, left = list(given), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        file, shorter = path, Path(scratch) / "options.yaml"

        def attempt(place: Path | None, options: Sequence[str]) -> tuple[ConfigT | None, str]:
            try:
                return resolve(place, options), ""
            except (DistillError, OSError) as error:
                return None, _named(error).replace(str(shorter), str(path))

        def without(values: Mapping[Any, Any], key: tuple[Any, ...]) -> Path:
            shorter.write_text(yaml.safe_dump(_less(values, key)))
            return shorter

        while True:
            config, told = attempt(file, sound)
            if config is not None:
                return config, left
            outlook.problem(told)
            names = [option.partition("=")[0] for option in sound]
            # Those that the error names first: each look costs milliseconds.
            order = sorted(range(len(sound)), key=lambda i: names[i].rpartition(".")[2] not in told)
            places = (i for i in order if _is_guilty(names[i], told, attempt(file, [*sound[:i], *sound[i + 1 :]])[1]))
            if (place := next(places, None)) is not None:
                left.append(sound.pop(place))
                continue
            values: dict[Any, Any] = {}
            with suppress(DistillError):
                values = read_yaml(file)
            keys = sorted(_keys(values), key=lambda key: str(key[-1]) not in told)
            guilty = (key for key in keys if _is_guilty(str(key[-1]), told, attempt(without(values, key), sound)[1]))
            if (key := next(guilty, None)) is None:
                return None, left
            file = without(values, key)
            left.append(f"{'.'.join(str(part) for part in key if part not in STAGES)}=")


def _is_guilty(option: str, told: str, without: str) -> bool:
    """Whether an option is at fault for an error, by the one without it, which may be that it is not there."""
    return without != told and not without.startswith(f"{option}: none is given")


def _keys(values: Mapping[Any, Any], above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys: list[tuple[Any, ...]] = []
    for name, value in values.items():
        keys += _keys(value, (*above, name)) if isinstance(value, dict) and value else [(*above, name)]
    return keys


def _less(values: Mapping[Any, Any], key: tuple[Any, ...]) -> dict[Any, Any]:
    """Values without one of theirs, several levels down."""
    name, *rest = key
    kept = {**values}
    inner = kept.pop(name)
    return {**kept, name: _less(inner, tuple(rest))} if rest else kept


def _named(error: DistillError | OSError) -> str:
    """An expected error as a problem."""
    return str(error) if isinstance(error, DistillError) else disk_words(error)


class _Checking:
    """The block of `Outlook.checking`."""

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, DistillError | OSError):
            return False
        self._outlook.problem(_named(error))
        return True


@contextmanager
def looking_only() -> Iterator[dict[str, int | None]]:
    """Fetch no weights and keep nothing that is fetched; what is found out about large data is kept, and read, as ever.

    Yields:
        Bytes of each model that would be downloaded, by name; None: not known.
    """
    before = os.environ.get(FOLDER_VARIABLE)
    with tempfile.TemporaryDirectory() as scratch, without_notes(), without_downloads(Path(scratch)) as missing:
        _link_kept_data(Path(scratch) / "caches")
        os.environ[FOLDER_VARIABLE] = f"{scratch}/caches"
        try:
            yield missing
        finally:
            os.environ.pop(FOLDER_VARIABLE)
            os.environ |= {} if before is None else {FOLDER_VARIABLE: before}


def _link_kept_data(folder: Path) -> None:
    """Let what is kept of large data (`data.sources.kept.store`) be the same in another folder, if it can be."""
    with suppress(ConfigError, OSError, RuntimeError):
        kept = mirror_settings()[0] / "data"
        folder.mkdir()
        (folder / kept.name).symlink_to(kept.absolute(), target_is_directory=True)


def download_lines(missing: dict[str, int | None]) -> list[str]:
    """A line for each model that would be downloaded."""
    return [
        f"  to download: {name}, {'of a size that is not known' if size is None else size_words(size)}"
        for name, size in missing.items()
    ]

"""Which files of a folder, or of a repository of the hub, make up a data set and a split of it.

`datasets` itself decides, from README.md's ``configs:`` and from names of files and folders, so that a data set is cut
here as the hub cuts it. Only names are looked at, so that a repository can be asked about before it is downloaded.
"""

import logging
import re
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.sources.hf import choose_split
from vlm_distill_cache.data.sources.image_folder import METADATA
from vlm_distill_cache.data.sources.table import NEEDED

_LIBRARY = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
)  # what `datasets` raises of a folder
KINDS = ("parquet", "json", "csv", "arrow", "webdataset", "imagefolder")
_CONVERTED = re.compile(r"(?:([^/]+)/)?([^/]+)/\d{4}\.parquet")  # what the hub makes of other formats
_OF = re.compile(r"(.*?)(\d{5})-of-(\d{5})(.*)")


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """The files of one split.

    Attributes:
        kind: One of ``KINDS``.
        config: Of the data sets in one repository; ``""`` where there is only one.
        split: Which one is read.
        paths: Relative to the folder, sorted.
        others: Files of the other splits.
    """

    kind: str
    config: str
    split: str
    paths: tuple[str, ...]
    others: frozenset[str]


def choose_files(folder: Path, *, config: str | None, split: str, strict: bool = False, where: str) -> DataFiles:
    """Find the files of a configuration and a split in a folder.

    Args:
        config: Its name; None: the only or the default one.
        split: A held-out split that is not there means ``train``, as of a file, unless ``strict``.
        where: What errors call the folder, as it is typed after ``DATA=``.

    Raises:
        DataError: There is no such configuration or split, no data, data of a kind that is not read, or a part of
            it is missing.
    """
    converted = _converted(folder, config, where)
    kind, config, splits = converted or _resolved(folder, config, where)
    chosen = split if strict else choose_split(split, list(splits), where=where)
    if chosen not in splits:
        raise DataError(
            f"{where} has no split {split!r}; it has {', '.join(sorted(splits))}: name one, DATA={where}"
            f":{f'name={config},' if config else ''}split={next(iter(splits))}"
        )
    paths = sorted(splits[chosen])
    _refuse_gaps(paths, where)
    others = {path for name, files in splits.items() if name != chosen for path in files}
    return DataFiles(kind=kind, config=config, split=chosen, paths=tuple(paths), others=frozenset(others - set(paths)))


def metadata_files(folder: Path, files: DataFiles) -> list[str]:
    """The metadata files of an image folder: the split's own, else those above its pictures, which speak of all splits.

    Raises:
        DataError: There is none, so that nothing is said about its pictures.
    """
    found = [path for path in files.paths if PurePosixPath(path).name in METADATA]
    if not found:
        above = {str(place) for path in files.paths for place in PurePosixPath(path).parents}
        named = {str(PurePosixPath(place) / name) for place in above for name in METADATA}
        found = sorted(path for path in named if (folder / path).is_file())
    if not found:
        classes = sorted({PurePosixPath(path).parent.name for path in files.paths} - {""})
        hint = f" Folders' names ({', '.join(classes[:3])}) are classes, not text." if classes else ""
        raise DataError(
            f"{folder} holds {len(files.paths)} pictures and no text about them: expected {', '.join(METADATA)} beside them "
            f"with file_name and what is said.{hint}"
        )
    return found


def _converted(folder: Path, config: str | None, where: str) -> tuple[str, str, dict[str, list[str]]] | None:
    """The branch refs/convert/parquet, ``CONFIG/SPLIT/0000.parquet``, where splits have any name; None for others."""
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]
    found = [_CONVERTED.fullmatch(path) for path in paths]
    if not found or not all(found) or any(path.name == "README.md" for path in folder.iterdir()):
        return None
    configs: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for match in filter(None, found):
        configs[match[1] or ""][match[2].removeprefix("partial-")].append(match[0])
    config = config or (next(iter(configs)) if len(configs) == 1 else "default")
    if config not in configs:
        raise DataError(_choose_config(where, config, sorted(configs)))
    return "parquet", config, configs[config]


def _choose_config(where: str, config: str | None, configs: Sequence[str]) -> str:
    asked = f"no data set {config!r}" if config and config != "default" else "several data sets"
    return (
        f"{where} holds {asked}; it has {', '.join(configs[:20])}{', ...' if len(configs) > 20 else ''}: name one, "
        f"DATA={where}:name={configs[0]}"
    )


def _resolved(folder: Path, config: str | None, where: str) -> tuple[str, str, dict[str, list[str]]]:
    if find_spec("datasets") is None:
        raise DataError(f"{where} needs an extra: {NEEDED}")
    # It says so of every README without settings.
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    root = folder.resolve()
    if script := next((path for path in (root / f"{root.name}.py",) if path.is_file()), None):
        raise DataError(_scripted(where, script.name))
    try:
        builder = _builder(root, config)
    except zipfile.BadZipFile as error:
        raise DataError(f"{where} holds .zip archives, which are not read: unpack them into the folder") from error
    except _LIBRARY as error:
        try:
            with _without_missing(root) as root:
                builder = _builder(root, config)
        except _LIBRARY:
            raise DataError(_no_files(folder, config, where, error)) from error
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in KINDS:
        raise DataError(f"{where} holds files of the kind {kind!r}, which is not read; expected {', '.join(KINDS)}")
    files = builder.config.data_files or {}
    splits = {str(split): [Path(path).relative_to(root).as_posix() for path in paths] for split, paths in files.items()}
    name = builder.config.name
    return kind, config or ("" if name.startswith("default") else name), splits


@contextmanager
def _without_missing(root: Path) -> Iterator[Path]:
    """A folder of the same names whose README.md tells of those files alone that are there; the folder itself if it does.

    Whoever downloads a part of a repository has its whole README.md.
    """
    from huggingface_hub import metadata_load

    readme = root / "README.md"
    try:
        card = metadata_load(readme) if readme.is_file() else None
        configs = [(config, *_present(root, config)) for config in (card or {}).get("configs") or []]
    except (ValueError, TypeError, AttributeError, OSError, yaml.YAMLError):
        configs = []
    if not any(missing for _, _, missing in configs):
        yield root
        return
    kept = [config | {"data_files": files} for config, files, _ in configs if files]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch).resolve() / root.name
        for path in root.rglob("*"):
            if path.is_file():
                place = copy / path.relative_to(root)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
        text = yaml.safe_dump({"configs": kept}) if kept else ""
        (copy / "README.md").write_text(f"---\n{text}---\n", encoding="utf-8")
        yield copy


def _present(root: Path, config: Mapping[str, Any]) -> tuple[Any, bool]:
    """The files of a configuration in README.md that are there, and whether others are not."""
    files = config.get("data_files", [])
    entries = files if isinstance(files, list) else [files]
    found = []
    for entry in entries:
        paths = entry["path"] if isinstance(entry, Mapping) else entry
        if any(any(root.glob(path)) for path in (paths if isinstance(paths, list) else [paths])):
            found.append(entry)
    return found, len(found) < len(entries)


def _builder(root: Path, config: str | None) -> Any:
    import datasets

    with tempfile.TemporaryDirectory() as scratch:  # it makes a folder for what it would convert
        try:
            return datasets.load_dataset_builder(str(root), config, cache_dir=scratch)
        except ValueError as error:
            if config is None or not (root / config).is_dir() or "Available: [" not in str(error):
                raise
            return datasets.load_dataset_builder(str(root), data_dir=config, cache_dir=scratch)  # a folder of a subset


def _scripted(where: str, script: str) -> str:
    plain = where.partition("@")[0]
    return (
        f"{where} is loaded by a program of its own ({script}), which is not run here; the hub keeps a copy as parquet "
        f"files: DATA={plain}@refs/convert/parquet"
    )


def _no_files(folder: Path, config: str | None, where: str, error: Exception) -> str:
    said = one_line(str(error).strip().partition("\n")[0])[:300]
    known = re.search(r"(?:Available|available configs): \[(.*)\]", str(error))
    if known:
        configs = [name.strip("' ") for name in known[1].split(",")]
        if configs == ["default"]:
            return f"{where} holds no data set {config!r}: it is one, without a name, and has no folder of that name"
        return _choose_config(where, config, configs)
    return f"{where} holds no data set that can be read: {said}"


def _refuse_gaps(paths: Iterable[str], where: str) -> None:
    """Refuse ``x-00000-of-00003`` without all of its kind: half a download is no data set."""
    sets: dict[tuple[str, int, str], set[int]] = defaultdict(set)
    for path in paths:
        if found := _OF.fullmatch(path):
            sets[found[1], int(found[3]), re.sub(r"-[0-9a-f]{16}", "", found[4])].add(int(found[2]))
    for (begin, count, end), numbers in sets.items():
        missing = sorted(set(range(count)) - numbers)
        if missing and count <= 99999:
            raise DataError(
                f"{where}: {len(missing)} of {count} files are missing, the first is {begin}{missing[0]:05d}-of-{count:05d}"
                f"{end}; finish the download, or name the files that are meant"
            )

"""Which files of a folder, or of a repository of the hub, make up a data set and a split of it.

`datasets` itself decides, from README.md's ``configs:`` and from names of files and folders, so that a data set is cut
here as the hub cuts it. Only names are looked at, so that a repository can be asked about before it is downloaded.
"""

import logging
import re
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.sources.hf import choose_split, no_such_split, says_split
from vlm_distill_cache.data.sources.image_folder import METADATA
from vlm_distill_cache.data.sources.patterns import KIND_OF_ENDING, UNFINISHED, are_parts, refuse_gaps
from vlm_distill_cache.data.sources.table import NEEDED

logger = logging.getLogger(__name__)

_LIBRARY = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
)  # what `datasets` raises of a folder
KINDS = ("parquet", "json", "csv", "arrow", "webdataset", "imagefolder", "videofolder")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json")
_CONVERTED = re.compile(r"(?:([^/]+)/)?([^/]+)/\d{4}\.parquet")  # what the hub makes of other formats


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """The files of one split.

    Attributes:
        kind: One of ``KINDS``.
        config: Of the data sets in one repository; ``""`` where there is only one.
        split: Which one is read; None: the only one, which neither names of files nor README.md call training data.
        paths: Relative to the folder, sorted.
        others: Files of the other splits.
    """

    kind: str
    config: str
    split: str | None
    paths: tuple[str, ...]
    others: frozenset[str]


def choose_files(
    folder: Path, *, config: str | None, split: str, strict: bool = False, where: str, remedy: str = UNFINISHED
) -> DataFiles:
    """Find the files of a configuration and a split in a folder.

    Args:
        config: Its name; None: the only or the default one.
        split: A held-out split that is not there means ``train``, as of a file, unless ``strict``.
        where: What errors call the folder, as it is typed after ``DATA=``.
        remedy: What to do where files of a numbered set are missing.

    Raises:
        DataError: There is no such configuration or split, no data, data of a kind that is not read, a part of it is
            missing, or nothing says that several files of texts are one data set.
    """
    converted = _converted(folder, config, where)
    kind, config, splits = converted or _resolved(folder, config, where)
    chosen = split if strict else choose_split(split, list(splits), where=where)
    listed = converted is not None or _lists_files(folder)
    unread = [] if listed or config else _unread(folder, splits)
    if chosen not in splits:
        said, named = no_such_split(split, list(splits), where)
        file = f", or a file that is of none of them, {_given(f'{where}/{unread[0]}')}" if unread else ""
        raise DataError(f"{said}, {_given(where)}:{f'name={config},' if config else ''}split={named}{file}")
    paths = sorted(splits[chosen])
    refuse_gaps(paths, where, remedy=remedy)
    if len(paths) > 1 and not listed and not _belong_together(paths, chosen):
        _tell_several(paths, kind, where)
    if unread:
        also = ", ".join(unread[:5]) + (", ..." if len(unread) > 5 else "")
        logger.warning(
            "%s: %s is read; passed over: %s (name a file, %s)", where, kind, also, _given(f"{where}/{unread[0]}")
        )
    others = {path for name, files in splits.items() if name != chosen for path in files}
    unnamed = chosen == "train" and not (listed or others or any(says_split(path, chosen) for path in paths))
    return DataFiles(
        kind=kind,
        config=config,
        split=None if unnamed else chosen,
        paths=tuple(paths),
        others=frozenset(others - set(paths)),
    )


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


def _lists_files(folder: Path) -> bool:
    """Whether README.md says which files belong together."""
    from huggingface_hub import metadata_load

    readme = folder / "README.md"
    try:
        card = metadata_load(readme) if readme.is_file() else None
        return any(config.get("data_files") for config in (card or {}).get("configs") or [])
    except (ValueError, TypeError, AttributeError, OSError, RecursionError, yaml.YAMLError):
        return False


def _belong_together(paths: Sequence[str], split: str) -> bool:
    """Whether the names of some files say that they are one split."""
    return are_parts(paths) or all(says_split(path, split) for path in paths)


def _tell_several(paths: Sequence[str], kind: str, where: str) -> None:
    """Refuse several files of texts that may be as many data sets; say of others that they are read as one.

    Published repositories hold a set and smaller ones made of it: together, samples would be there twice.
    """
    names = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
    if kind in ("json", "csv"):
        raise DataError(
            f"{where} holds {len(paths)} files, and nothing says that they are one data set: {names}; name one, "
            f"{_given(f'{where}/{paths[0]}')}, several by a pattern, or list them in a mixture (.yaml)"
        )
    if kind == "parquet":
        logger.info("%s: %d files are read as one data set: %s", where, len(paths), names)


def _unread(folder: Path, splits: Mapping[str, Sequence[str]]) -> list[str]:
    """Files of data that no split has."""
    read = {path for paths in splits.values() for path in paths}
    found = []
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in inner.parts)
        described = path.name in METADATA or path.name.lower() in _DESCRIPTIONS
        if path.suffix.lower() in KIND_OF_ENDING and not hidden and not described and path.is_file():
            found += [inner.as_posix()] if inner.as_posix() not in read else []
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
        f"{_given(where)}:name={configs[0]}"
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
    except (ValueError, TypeError, AttributeError, OSError, RecursionError, yaml.YAMLError):
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
        f"files: {_given(plain)}@refs/convert/parquet"
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


def _given(place: object) -> str:
    """How data are named on a command line."""
    return by_make(f"DATA={place}", f"--data {place}")

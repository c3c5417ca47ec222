"""Data sets of the Hugging Face Hub by their names: ``ORG/NAME[@REVISION]``, one configuration and one split of it.

A revision is resolved to its commit, once, and everything is read from that. Files are downloaded into the hub's own
cache (``HF_HOME``), those of the wanted split alone; offline they are read from there. A set of parquet files can be
streamed: then ranges of its files are read as samples are asked for.
"""

import logging
import posixpath
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_distill_cache.common.errors import DataError, ModelError, SampleError, TransferError
from vlm_distill_cache.common.hub import HubName, downloading, explained_hub_errors, snapshot_name, snapshots_of
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.remotes.copies import describe_files
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.images.recognise import VIDEO_EXTENSIONS, picture_extensions
from vlm_distill_cache.data.images.video import VideoFile
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.sources.addresses import open_remote_files
from vlm_distill_cache.data.sources.csv_rows import SUFFIXES, CsvDataset
from vlm_distill_cache.data.sources.folders import DataFiles, choose_files, metadata_files
from vlm_distill_cache.data.sources.grouping import JoinedSamples
from vlm_distill_cache.data.sources.hf import ArrowDataset, HuggingFaceDataset, is_saved_dataset
from vlm_distill_cache.data.sources.image_folder import METADATA, ImageFolderDataset
from vlm_distill_cache.data.sources.llava import LlavaDataset
from vlm_distill_cache.data.sources.messages import MessagesDataset, holds_lines
from vlm_distill_cache.data.sources.parquet import HubParquet, LocalParquet, ParquetDataset
from vlm_distill_cache.data.sources.patterns import KIND_OF_ENDING, is_pattern, matching, refuse_gaps
from vlm_distill_cache.data.sources.pictures import image_folder
from vlm_distill_cache.data.sources.webdataset import WebDataset

logger = logging.getLogger(__name__)
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".gz", ".zst")
_PROBED = 8  # samples
_LACKING = "the repository {name} itself lacks them: name those that are there one by one, or tell its owner"
_LISTED = 300  # files that are asked for one by one; more by their folders


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is meant of a data set with several parts.

    Attributes:
        config: One of the data sets that a repository holds; None: the only one.
        split: Which split; a held-out one that is not there means ``train`` unless ``strict``.
        strict: The split was named with the data set.
        images: Folder that relative image paths start from; None: the data set's own.
    """

    config: str | None = None
    split: str = "train"
    strict: bool = False
    images: Path | None = None


def open_folder(folder: Path, choice: Choice) -> Dataset:
    """Open a folder as the hub lays data sets out: parquet files, an image folder, tars, JSON, CSV.

    Raises:
        DataError: It holds none, or another part than was asked for.
    """
    folder = _snapshot_of(folder)
    if is_saved_dataset(folder):
        return _with_origin(
            HuggingFaceDataset(folder, split=choice.split, strict=choice.strict, images=choice.images),
            _origin(folder, ""),
        )
    files = choose_files(folder, config=choice.config, split=choice.split, strict=choice.strict, where=str(folder))
    name = snapshot_name(folder)
    called = _called(folder.name if name is None else name.repository, files)
    dataset = open_files(folder, files, name=called, images=choice.images)
    return _with_origin(dataset, _origin(folder, files.config))


def open_name(name: HubName, choice: Choice, *, file: str | None = None, streaming: bool = False) -> Dataset:
    """Open a data set of the hub; of its files those that ``file`` names, a path in the repository or a pattern.

    Raises:
        DataError: There is no such data set or part of one, or it is of a kind that is not read.
        TransferError: The hub cannot be reached, and the cache does not hold it.
    """
    commit, listed, here = _listing(name, streaming=streaming)
    origin = {"repository": name.repository, "revision": commit}
    if file is None and not streaming and any(PurePosixPath(path).name in _SAVED for path in listed):
        return _with_origin(_open_saved(_files_of(name, commit, None, here=here), choice), origin)
    files = _choose(name, commit, listed, choice, here=here) if file is None else _named(name, file, listed)
    called = _called(name.repository, files) if file is None else f"{name.repository}/{file}"
    origin |= {"config": files.config} if files.config else {}
    origin |= {} if file is None else {"file": file}
    if not streaming:
        folder = _files_of(name, commit, _wanted(files, listed), here=here)
        dataset: Dataset = open_files(folder, files, name=called, images=choice.images)
        if choice.images is None:
            _refuse_pictures_left(name, dataset, files, listed)
        return _with_origin(dataset, origin)
    if files.kind == "webdataset":
        where = f"hf://datasets/{name.repository}@{commit}"
        archives = describe_files(f"{where}/{path}" for path in files.paths)
        streamed = open_remote_files(archives, name=called, where=where, images=choice.images)
        streamed.split = files.split
        return _with_origin(streamed, origin)
    if files.kind != "parquet":
        raise DataError(
            f"{name} holds files of the kind {files.kind!r}; only parquet files and tars are streamed: leave out "
            f"streaming=true, or try the hub's own copy, {by_make('DATA=', '--data ')}{name.repository}@refs/convert/parquet"
        )
    sources = [HubParquet(name.repository, commit, path) for path in files.paths]
    dataset = ParquetDataset(sources, name=called, where=str(name), image_root=choice.images)
    dataset.split = files.split
    return _with_origin(dataset, origin)


def open_files(folder: Path, files: DataFiles, *, name: str, images: Path | None) -> Dataset:
    """Open the files of a split with the reader of their kind."""
    dataset = _open_files(folder, files, name=name, images=images)
    dataset.split = files.split
    return dataset


def _open_files(folder: Path, files: DataFiles, *, name: str, images: Path | None) -> Dataset:
    paths = [folder / path for path in files.paths]
    root = folder if images is None else image_folder(images, paths[0])
    where = str(folder)
    if files.kind == "parquet":
        return ParquetDataset([LocalParquet(path) for path in paths], name=name, where=where, image_root=root)
    if files.kind in ("imagefolder", "videofolder"):
        folded = ImageFolderDataset(folder, metadata_files(folder, files), name=name, others=files.others)
        _tell_unnamed(folded, files)
        return folded
    if files.kind == "arrow":
        return ArrowDataset(paths, name=name, image_root=root)
    if files.kind == "webdataset":
        dataset: Dataset = WebDataset(str(folder / "*.tar"), paths=paths)
    else:
        parts = [open_file(path, images=images) for path in paths]
        dataset = parts[0] if len(parts) == 1 else JoinedSamples(parts, name=name)
    dataset.name = name
    return dataset


def _tell_unnamed(dataset: ImageFolderDataset, files: DataFiles) -> None:
    """Say how many pictures of an image folder no row of its metadata is about."""
    named: set[str] = set()
    for index in range(len(dataset)):
        with suppress(SampleError):
            entry = dataset.read(index)
            values = [entry.get(key) for key in dataset.picture_keys | dataset.video_keys]
            listed = [item for value in values for item in (value if isinstance(value, list) else [value])]
            named |= {posixpath.normpath(item) for item in listed if isinstance(item, str)}
    left = sorted(path for path in files.paths if PurePosixPath(path).name not in METADATA and path not in named)
    if left:
        logger.warning("%s: %d pictures are left out: no row of the metadata names them, as %s", dataset.name,
                       len(left), left[0])  # fmt: skip


def open_file(path: Path, *, images: Path | None) -> Dataset:
    """Open a JSON, JSON lines, CSV or TSV file."""
    if path.suffix.lower() in SUFFIXES:
        return CsvDataset(path, images=images)
    return (MessagesDataset if holds_lines(path) else LlavaDataset)(path, images=images)


def _open_saved(folder: Path, choice: Choice) -> Dataset:
    if choice.config is not None:
        raise DataError(f"{folder} is one data set of datasets.save_to_disk; leave out name=")
    return HuggingFaceDataset(folder, split=choice.split, strict=choice.strict, images=choice.images)


def _listing(name: HubName, *, streaming: bool) -> tuple[str, list[str], bool]:
    """The commit that a name stands for, its files, and whether only what is in the hub's cache can be had."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        if streaming:
            raise DataError(f"{name}: streaming=true reads from the hub, which HF_HUB_OFFLINE switches off; unset it")
        return *_cached_listing(name), True
    try:
        with _asking(name):
            wait = constants.HF_HUB_ETAG_TIMEOUT
            info = HfApi().dataset_info(name.repository, revision=name.revision or None, timeout=wait)
            return str(info.sha), [entry.rfilename for entry in info.siblings or ()], False
    except TransferError as error:
        try:
            commit, listed = _cached_listing(name)
        except DataError:
            raise error from None
        if streaming:
            raise
        logger.warning("%s; the copy in the hub's cache is used: %s@%s", error, name.repository, commit)
        return commit, listed, True


def _cached_listing(name: HubName) -> tuple[str, list[str]]:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                name.repository,
                repo_type="dataset",
                revision=name.revision or None,
                local_files_only=True,
                allow_patterns="README.md",
            )
        )
    except (LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{name}: no such file or folder, and the data set is not in the hub's cache ({constants.HF_HUB_CACHE}); the hub "
            f"is switched off by HF_HUB_OFFLINE: unset it, or run `hf download {name.repository} --repo-type dataset` on a "
            "machine with a network and set HF_HOME to what it wrote"
        ) from error
    return folder.name, _cached_tree(name.repository, folder)


def _cached_tree(repository: str, folder: Path) -> list[str]:
    """All files of a commit, as the library noted them when it downloaded some; of an older one, those that are here."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        return [entry.path for entry in get_cached_repo_tree(repository, repo_type="dataset", revision=folder.name)]
    except (ImportError, CachedRepoTreeNotFoundError):
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _choose(name: HubName, commit: str, listed: Sequence[str], choice: Choice, *, here: bool) -> DataFiles:
    """Which files are wanted, before any but README.md is downloaded."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name.repository.partition("/")[2]
        for path in listed:
            # Names that would leave the folder are none that a hub gives.
            if ".." in PurePosixPath(path).parts or path.startswith("/"):
                raise DataError(f"{name}: the hub lists a file {path!r}, which is no path in a repository")
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        if "README.md" in listed:
            stored = _files_of(name, commit, ["README.md"], here=here) / "README.md"
            (folder / "README.md").write_bytes(stored.read_bytes())
        return choose_files(
            folder,
            config=choice.config,
            split=choice.split,
            strict=choice.strict,
            where=str(name),
            remedy=_LACKING.format(name=name),
        )


def _named(name: HubName, file: str, listed: Sequence[str]) -> DataFiles:
    """The files that a path or a pattern means."""
    paths = matching(file, listed)
    if not paths:
        others = [path for path in listed if PurePosixPath(path).suffix.lower() in KIND_OF_ENDING]
        has = ", ".join(others[:20]) + (", ..." if len(others) > 20 else "") if others else "no file of data"
        raise DataError(f"{name} has no file {file!r}; it has {has}")
    if is_pattern(file):
        refuse_gaps(paths, str(name), remedy=_LACKING.format(name=name))
    kind = KIND_OF_ENDING[PurePosixPath(file).suffix.lower()]
    return DataFiles(kind=kind, config="", split=None, paths=tuple(paths), others=frozenset())


def _refuse_pictures_left(name: HubName, dataset: Dataset, files: DataFiles, listed: Sequence[str]) -> None:
    """Refuse data whose pictures are in archives, or files beside a table: they are not downloaded here.

    Raises:
        DataError: Of some samples spread over the data each picture is a file that is not there.
    """
    others = [path for path in listed if path not in files.paths]
    archives = [path for path in others if path.lower().endswith(_ARCHIVES)]
    tables = files.kind in ("parquet", "arrow")
    # Beside texts they are downloaded (`_wanted`): many tables have their pictures in them, and some more beside them.
    shown = picture_extensions() | VIDEO_EXTENSIONS
    pictures = [p for p in others if tables and p.rpartition(".")[2].lower() in shown]
    if files.kind not in ("json", "csv", "parquet", "arrow") or not (archives or pictures):
        return
    found: list[ImageFile | VideoFile] = []
    for index in sorted({place * len(dataset) // _PROBED for place in range(_PROBED)}):
        with suppress(SampleError):
            found += [image for image in dataset[index].images if isinstance(image, ImageFile | VideoFile)]
    if not found or any(image.path.is_file() for image in found):
        return
    lies, unpack = (archives[0], "unpack the archives there, ") if archives else (pictures[0], "")
    place = f"/{files.paths[0]}" if len(files.paths) == 1 else f":name={files.config}" if files.config else ""
    revision = f" --revision {name.revision}" if name.revision else ""
    raise DataError(
        f"{name} names its pictures as files ({found[0].name}), which are not downloaded with it; the repository holds "
        f"{lies}: run `hf download {name.repository}{revision} --repo-type dataset --local-dir FOLDER`, {unpack}and give "
        f"{by_make('DATA=', '--data ')}"
        f"FOLDER{place} and, as {by_make('IMAGES= (--images)', '--images')}, the folder that their paths start from"
    )


def _wanted(files: DataFiles, listed: Sequence[str]) -> list[str]:
    """What to download: the files of a split, and pictures and videos that texts may name."""
    wanted = list(files.paths)
    if files.kind in ("json", "csv"):
        shown = picture_extensions() | VIDEO_EXTENSIONS
        wanted += [path for path in listed if path.rpartition(".")[2].lower() in shown]
    if files.kind in ("imagefolder", "videofolder"):
        wanted += [path for path in listed if PurePosixPath(path).name in METADATA]
    if len(wanted) <= _LISTED:
        return [escape(path) for path in wanted]
    places = {(str(PurePosixPath(path).parent), PurePosixPath(path).suffix) for path in wanted}
    return sorted(f"{'' if folder == '.' else f'{escape(folder)}/'}*{suffix}" for folder, suffix in places)


def _files_of(name: HubName, commit: str, wanted: Sequence[str] | None, *, here: bool) -> Path:
    """The snapshot with the wanted files of a commit, or with all; what is not there yet is downloaded unless ``here``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fetch = partial(snapshot_download, name.repository, repo_type="dataset", allow_patterns=wanted)
    if here:
        try:
            return Path(fetch(revision=commit, local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise DataError(
                f"{name}: only a part of it is in the hub's cache, and the hub is switched off or cannot be reached: "
                f"{str(error).partition(' Re-run')[0]} Run the same command with a network once"
            ) from error
    with _asking(name), downloading() as bars:
        folder = Path(fetch(revision=name.revision or None, tqdm_class=bars))  # by its name: the cache notes it
        return folder if folder.name == commit else Path(fetch(revision=commit, tqdm_class=bars))


@contextmanager
def _asking(name: HubName) -> Iterator[None]:
    """Errors of the client library as errors of the data set."""
    try:
        with explained_hub_errors(name, "data", kind="dataset"):
            yield
    except (ModelError, TransferError) as error:
        said = str(error).replace("no such folder", "no such file or folder")
        said = said.replace(f"hf download {name.repository}", f"hf download {name.repository} --repo-type dataset")
        raise (DataError if isinstance(error, ModelError) else TransferError)(said) from error


def _snapshot_of(folder: Path) -> Path:
    """The snapshot that a folder of the hub's cache stands for; any other folder itself."""
    if not (folder.name.startswith("datasets--") and (folder / "snapshots").is_dir()):
        return folder
    chosen = snapshots_of(folder)
    if len(chosen) != 1:
        listed = ", ".join(map(str, chosen[:5])) or "none"
        raise DataError(f"{folder} holds several snapshots and no main branch: {listed}; give one of them")
    return chosen[0]


def _called(repository: str, files: DataFiles) -> str:
    return f"{repository}:{files.config}" if files.config else repository


def _origin(folder: Path, config: str) -> dict[str, Any]:
    """What a plan records of a folder of the hub's cache; nothing of another one."""
    name = snapshot_name(folder)
    if name is None:
        return {}
    return {"repository": name.repository, "revision": name.revision, **({"config": config} if config else {})}


def _with_origin(dataset: Dataset, origin: Mapping[str, Any]) -> Dataset:
    dataset.origin = origin
    return dataset

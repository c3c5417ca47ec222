"""Names of the Hugging Face Hub: ``org/name[@revision]`` in, a folder of the hub's own cache and its commit out.

All traffic is the client library's own, so ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_TOKEN``, ``HF_ENDPOINT`` and
``HF_HUB_OFFLINE`` mean here what they mean everywhere. A name is resolved once, early: everything below sees a folder,
and a folder of the hub's cache (``models--org--name/snapshots/COMMIT``) tells whose it is.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_distill_cache.common.errors import DistillError, ModelError, TransferError
from vlm_distill_cache.common.files.disk import AGAIN, name_full_disk
from vlm_distill_cache.common.locations import nearest_path
from vlm_distill_cache.common.printing import one_line

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)
_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^\s@]+))?", re.ASCII)
_PROJECT = Path(__file__).resolve().parent.parent  # the folder that holds stage1_teacher/builtin
_EVERY_S = 30.0  # between lines of progress
_LONGEST = 96  # characters of each part
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEB = re.compile(
    r"(?:https?://[^/]+/|hf://)(?:models/)?([\w.-]+/[\w.-]+?)(?:/(?:tree|blob)/([^/]+).*|@([^/]+))?/?", re.ASCII
)
# Of the files at a repository's top: what a model is read from here. Code is never fetched.
_SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")
_TENSORS = ("*.safetensors", "mm_projector.bin", "non_lora_trainables.bin")
_PICKLED = ("pytorch_model*.bin", "adapter_model.bin")  # only where there are no safetensors
_IGNORED = ("*/*", "consolidated*", "*.onnx*", "*.gguf")
CARD = "README.md"  # brought along with the settings, for the licence that it states; nothing needs it
_CONFIGS = ("config.json", "adapter_config.json")
_WEIGHTS = (".safetensors", ".bin")
_OTHER_WEIGHTS = (".gguf", ".onnx", ".pth", ".pt", ".msgpack", ".h5", ".ckpt", ".mlmodel", ".npz")


class HubName(NamedTuple):
    """A repository of the hub: ``org/name``, and a branch, tag or commit; ``""``: the default branch."""

    repository: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


class HubFolder(NamedTuple):
    """A model's folder.

    Attributes:
        path: Of a hub's name, below the hub's cache, where the files are links.
        name: ``org/name`` where the folder lies in a hub's cache, else the folder's own name.
        revision: The commit, 40 hexadecimal digits; ``""`` for a plain folder.
    """

    path: Path
    name: str
    revision: str


def hub_name(given: str) -> HubName | None:
    """Read ``org/name[@revision]``; None for what cannot be a repository's name, by the hub's own rules."""
    found = _NAME.fullmatch(given)
    if found is None:
        return None
    repository = found["repository"]
    wrong = any(text in repository for text in ("--", "..")) or repository.endswith(".git")
    allowed = not wrong and all(len(p) <= _LONGEST and not p.endswith((".", "-")) for p in repository.split("/"))
    return HubName(repository, found["revision"] or "") if allowed else None


def snapshot_name(folder: Path) -> HubName | None:
    """Whose snapshot a folder of a hub's cache is, links to it resolved; None for other folders."""
    place = folder.resolve()
    kind, _, repository = place.parent.parent.name.partition("--")
    if place.parent.name != "snapshots" or kind not in ("models", "datasets") or not _COMMIT.fullmatch(place.name):
        return None
    return HubName(repository.replace("--", "/"), place.name) if repository else None


def on_hub(given: str) -> HubName | None:
    """A model of the hub, by repository and commit; None for all other texts."""
    found = hub_name(given)
    return found if found is not None and _COMMIT.fullmatch(found.revision) else None


def public_name(given: str) -> str:
    """What to write down of a model that was given: ``org/name@COMMIT`` for a folder of a hub's cache, else as it is."""
    name = snapshot_name(Path(given)) if given and Path(given).is_dir() else None
    return given if name is None else str(name)


def model_folder(given: str | Path, *, what: str, check: Callable[[Path], object] = lambda folder: None) -> HubFolder:
    """Find the model that somebody names: a folder, a hub's name, or a link folder of a hub's cache.

    A folder comes first. A name is asked of the hub, unless that is switched off, and what is not in the hub's cache yet
    is downloaded; a commit that is all there needs no request.

    Args:
        given: A folder; ``org/name[@revision]``; ``.../models--org--name`` with or without ``/snapshots/COMMIT``.
        what: Whose place it is, for errors: ``teacher``, ``student_weights``.
        check: Refuses a model by its settings; called before the weights are downloaded.

    Raises:
        ModelError: If there is neither such a folder nor such a name, or no model in it.
        TransferError: If it could not be downloaded.
    """
    given = str(given)
    path = Path(given)
    if path.is_dir():
        return _local_folder(path, what)
    if path.exists():  # a file: who reads it says best what it is, and what to give instead
        return HubFolder(path, path.name, "")
    name = hub_name(given)
    ours = _PROJECT / given
    if not path.is_absolute() and (ours / "config.json").is_file():  # named as in a clone, elsewhere
        raise ModelError(f"{what} {given}: there is no such folder here; the one of this program is {ours}: give that")
    if name is None:
        raise ModelError(_no_folder(given, what))
    try:
        return _folder_of_hub(name, what, check)
    except (ModelError, TransferError) as error:
        near = nearest_path(path)
        if not near and not path.parent.is_dir():
            raise
        hint = near or f"; {path.parent} is a folder here, and holds no {path.name}"
        raise type(error)(f"{error}{hint}") from error


def _local_folder(path: Path, what: str) -> HubFolder:
    place = path.resolve()
    holder = place.parent if place.name == "snapshots" else place
    if holder.name.startswith("models--") and (holder / "snapshots").is_dir():
        chosen = snapshots_of(holder)
        if len(chosen) != 1:
            listed = ", ".join(entry.name for entry in chosen[:5]) or "none"
            raise ModelError(
                f"{what} {holder}: expected the snapshot of its main branch, or one; found {listed}: give one of them"
            )
        path = chosen[0]
    for entry in path.iterdir():
        if entry.is_symlink() and not entry.exists():
            raise ModelError(
                f"{what} {path}: {entry.name} is a link to {entry.readlink()}, which is not there; a folder of the hub's "
                "cache is moved with the blobs beside it, or copied with `cp -rL`"
            )
    name = snapshot_name(path)
    return HubFolder(path, path.resolve().name, "") if name is None else HubFolder(path, *name)


def snapshots_of(holder: Path) -> list[Path]:
    """The snapshot of the main branch in a repository's folder of a hub's cache; all of them where that is not there."""
    snapshots = sorted(entry for entry in (holder / "snapshots").iterdir() if entry.is_dir())
    main = holder / "refs" / "main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    return [entry for entry in snapshots if entry.name == commit] or snapshots


def _folder_of_hub(name: HubName, what: str, check: Callable[[Path], object]) -> HubFolder:
    """The snapshot of a name: complete from the cache where the hub need not or cannot be asked, else downloaded."""
    from huggingface_hub import constants

    cached, lacks = _cached(name)
    if constants.HF_HUB_OFFLINE or (cached and _COMMIT.fullmatch(name.revision)):
        if cached is None:
            raise ModelError(
                f"{what} {name}: no such folder, and the hub's cache ({constants.HF_HUB_CACHE}) has not all of the model "
                f"({lacks}); the hub is switched off by HF_HUB_OFFLINE: unset it, or {_elsewhere(name)}"
            )
        return _found(cached)
    try:
        with explained_hub_errors(name, what):
            commit = _ask(name, what)
    except DistillError as error:
        if cached is None or isinstance(error, _RefusedError):
            raise
        reason = str(error).split("; ")[0]
        logger.warning("%s: the copy in the hub's cache is used: %s", reason, snapshot_name(cached))
        return _found(cached)
    there = _cached(HubName(name.repository, commit))[0] is not None
    with explained_hub_errors(name, what):
        if _looking is not None and not there:
            return _found(_looking.fetch_settings(name, commit, check))
        return _found(_download(name, check, what="" if there else what))


@dataclass
class _Looking:
    """What is looked at while nothing is downloaded: settings in a folder of their own, and what was left away."""

    folder: Path
    missing: dict[str, int | None] = field(default_factory=dict)

    def fetch_settings(self, name: HubName, commit: str, check: Callable[[Path], object]) -> Path:
        from huggingface_hub import HfApi, snapshot_download

        target = self.folder / f"models--{name.repository.replace('/', '--')}" / "snapshots" / commit
        if not target.is_dir():
            snapshot_download(
                name.repository,
                revision=commit,
                local_dir=target,
                allow_patterns=list(_SETTINGS),
                ignore_patterns=list(_IGNORED),
            )
            listed = HfApi().model_info(name.repository, revision=commit, files_metadata=True).siblings or ()
            sizes = [entry.size for entry in listed if entry.rfilename.endswith(_WEIGHTS)]
            self.missing[str(name)] = None if None in sizes else sum(size or 0 for size in sizes)
        check(target)
        return target


_looking: _Looking | None = None


@contextmanager
def without_downloads(folder: Path) -> Iterator[dict[str, int | None]]:
    """Fetch no weights: of a model that is not here, only its settings, into ``folder``; for one thread at a time.

    Yields:
        Bytes of the weights that were left away, by name; None: not known.
    """
    global _looking
    before, _looking = _looking, _Looking(folder)
    try:
        yield _looking.missing
    finally:
        _looking = before


def is_without_weights(folder: Path) -> bool:
    """Whether a model's folder has its settings alone because nothing is downloaded at the moment."""
    return _looking is not None and folder.is_relative_to(_looking.folder)


def _found(snapshot: Path) -> HubFolder:
    name = snapshot_name(snapshot)
    assert name is not None, snapshot  # as the client library lays them out
    return HubFolder(snapshot, *name)


def _ask(name: HubName, what: str) -> str:
    """The commit that a revision stands for now; refuses a repository without a usable model before its download."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(name.repository, revision=name.revision or None, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if not info.sha:
        raise ValueError("no commit in its answer")
    files = [entry.rfilename for entry in info.siblings or () if "/" not in entry.rfilename]
    if lacks := _unusable(files):
        raise _RefusedError(f"{what} {name}: {lacks}")
    return str(info.sha)


class _RefusedError(ModelError):
    """What is wrong with a name whatever the cache holds."""


def _unusable(files: list[str]) -> str:
    """Why a repository of these files is no model here; empty if it may be one."""
    others = sorted({suffix for file in files if (suffix := Path(file).suffix) in _OTHER_WEIGHTS})
    remedy = (
        "give the repository of the original model: config.json, safetensors, tokenizer and preprocessor_config.json"
    )
    if not any(file.endswith(_WEIGHTS) for file in files):
        only = f"only {', '.join(others)} files, which cannot be used here" if others else "no weights"
        return f"the repository holds {only}; {remedy}"
    if not any(file in _CONFIGS for file in files):
        return f"the repository holds no config.json; {remedy}"
    return ""


def _lacks(snapshot: Path) -> str:
    """What a snapshot in the cache lacks of a model, as far as its own files tell; empty if nothing."""
    if not any((snapshot / name).is_file() for name in _CONFIGS):
        return "config.json is missing"
    tensors = any(snapshot.glob("*.safetensors"))
    if not tensors and not any(snapshot.glob("*.bin")):
        return "the weights are missing"
    index = snapshot / ("model.safetensors.index.json" if tensors else "pytorch_model.bin.index.json")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""  # no index; what reads the weights says what is wrong with a damaged one
    return ", ".join(f"{shard} is missing" for shard in shards if not (snapshot / str(shard)).is_file())


def _cached(name: HubName) -> tuple[Path | None, str]:
    """The snapshot that the hub's cache holds, found without a request; or None, and what of it is missing there."""
    try:
        snapshot = _with_weights(name, local_files_only=True)
    except OSError as error:  # the library's LocalEntryNotFoundError, or one of its kind that names a folder
        return None, "some files are missing" if getattr(error, "snapshot_path", None) else "nothing of it is there"
    lacks = _lacks(snapshot)
    return (None, lacks) if lacks else (snapshot, "")


def _download(name: HubName, check: Callable[[Path], object], *, what: str) -> Path:
    """Download what of a repository is not there yet; ends at once when the process is told to stop.

    ``what``, if it is given, is said to be downloaded, once the hub has let us in and the settings do.
    """
    from huggingface_hub import constants

    with _ending_at_once() as stopped, name_full_disk(Path(constants.HF_HUB_CACHE)):
        bars = _bars(stopped)
        folder = _snapshot(name, (*_SETTINGS, CARD), tqdm_class=bars)
        check(folder)
        if what:
            logger.info("%s: downloading %s@%s into %s", what, name.repository, folder.name, constants.HF_HUB_CACHE)
        return _with_weights(HubName(name.repository, folder.name), tqdm_class=bars)


def _with_weights(name: HubName, **how: Any) -> Path:
    folder = _snapshot(name, (*_SETTINGS, *_TENSORS), **how)
    if any(folder.glob("*.safetensors")):
        return folder
    return _snapshot(HubName(name.repository, folder.name), (*_SETTINGS, *_TENSORS, *_PICKLED), **how)


def _snapshot(name: HubName, kinds: Sequence[str], **how: Any) -> Path:
    from huggingface_hub import snapshot_download

    revision, chosen = name.revision or None, {"allow_patterns": list(kinds), "ignore_patterns": list(_IGNORED)}
    return Path(snapshot_download(name.repository, revision=revision, **chosen, **how))


@contextmanager
def _ending_at_once() -> Iterator[threading.Event]:
    """Tell of Ctrl-C and SIGTERM: the library's threads would each finish their file first."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        stopped.set()
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    handled = [number for number, handler in before.items() if callable(handler)]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        stopped.set()
        for number in handled:
            signal.signal(number, before[number])


@contextmanager
def downloading() -> Iterator[type[tqdm[Any]]]:
    """Progress bars for the client library's downloads, which end at once when the process is told to stop.

    Raises:
        DistillError: If the disk of the hub's cache is full.
    """
    from huggingface_hub import constants

    with _ending_at_once() as stopped, name_full_disk(Path(constants.HF_HUB_CACHE)):
        yield _bars(stopped)


class _StoppedError(Exception):
    """Ends a thread that downloads."""


def _bars(stopped: threading.Event) -> type[tqdm[Any]]:
    """Progress of a download, of which each piece passes here: bars on a terminal, else a line every 30 s.

    Of several processes the first one alone shows it: the others log errors only.
    """
    from tqdm import tqdm  # not before the environment says whether there are to be bars

    # Not what the library says of itself: its bars are switched off by every command of ours.
    unwanted = any(os.environ.get(name) for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"))
    hidden = unwanted or not sys.stderr.isatty() or not logger.isEnabledFor(logging.INFO)
    said = [time.monotonic()]

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            self.done, self.counts_bytes = options.get("initial") or 0, options.get("unit") == "B"
            desc = one_line(options.get("desc") or "")  # may be a name of somebody's file
            super().__init__(*args, **options | {"desc": desc, "disable": hidden, "leave": False})

        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise _StoppedError
            self.done += n or 0
            if hidden and not unwanted and self.counts_bytes and time.monotonic() - said[0] >= _EVERY_S:
                said[0] = time.monotonic()
                done, total = (tqdm.format_sizeof(size, "B") for size in (self.done, self.total or 0))
                logger.info("downloading: %s of %s", done, total)
            return super().update(n)

    Bar.set_lock(threading.RLock())
    return Bar


@contextmanager
def explained_hub_errors(name: HubName, what: str, *, kind: str = "model") -> Iterator[None]:
    """Turn the client library's errors into one line that says what to type.

    Args:
        kind: Of the repository: ``model`` or ``dataset``.

    Raises:
        ModelError: If there is no such repository or revision, or no access to it.
        TransferError: If the hub could not be reached, or the transfer broke off.
    """
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except DistillError:
        raise
    # RuntimeError: of hf_xet; ValueError: an answer that is none of a hub's.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _explain(error, name, what, kind) from error


def _explain(error: Exception, name: HubName, what: str, kind: str) -> DistillError:
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return TransferError(
            f"{what} {name}: {error.filename or constants.HF_HUB_CACHE} cannot be written ({error.strerror}); set HF_HOME to "
            "a folder for the hub's cache that can, or make it writable"
        )
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name.repository}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        so = "your token is not let in" if get_token() else "no token is given"
        return ModelError(
            f"{what} {name}: the repository is gated, and {so}: accept its terms on {page}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return _RefusedError(
            f"{what} {name}: the repository has no branch, tag or commit {name.revision!r}; {page}/commits lists them, "
            f"{name.repository} alone is its newest"
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return ModelError(
            f"{what} {name}: there is no such folder, and no such repository on the hub ({page}), or it is private: correct "
            "the path or the name; for a private one log in with `hf auth login` or set HF_TOKEN"
        )
    reason = one_line((str(error) or type(error).__name__).split("\n")[0])
    if status is not None and status < 500:
        return TransferError(f"{what} {name}: the hub ({constants.ENDPOINT}) refuses: {reason}; {AGAIN}")
    return TransferError(
        f"{what} {name}: no such folder, and the hub ({constants.ENDPOINT}) cannot be reached, or broke off ({reason}); "
        f"{AGAIN}; without a network give a folder, or {_elsewhere(name)}"
    )


def _elsewhere(name: HubName) -> str:
    revision = f" --revision {name.revision}" if name.revision else ""
    return (
        f"run `hf download {name.repository}{revision}` on a machine with a network, copy its ~/.cache/huggingface here and "
        "set HF_HOME to the copy"
    )


def _no_folder(given: str, what: str) -> str:
    """Both readings of a name that is neither a folder nor a repository's name."""
    if web := _WEB.fullmatch(given):
        revision = web[2] or web[3]
        return f"{what} {given}: an address; type {web[1]}{f'@{revision}' if revision else ''}"
    return (
        f"{what} {one_line(given)}: there is no such folder, and a name on the hub is org/name or org/name@revision, as in "
        f"llava-hf/llava-1.5-7b-hf{nearest_path(given)}"
    )

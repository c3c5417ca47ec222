"""Files that are either whole or absent: write to a temporary name, fsync, rename.

A temporary name is ``.tmp-NAME-PID-RANDOM`` beside its target, and its writer holds a lock on it
(``flock``, which dies with the process). So the next writer can tell a killed run's leftovers, which it
removes, from the file another process is writing at this moment, which it leaves alone. The lock belongs
to the inode and survives the rename: a published shard stays locked until its sidecar is there.
File systems without ``flock`` work too; there leftovers stay until somebody deletes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.disk import name_written

TEMPORARY_PREFIX = ".tmp-"
MAX_JSON_BYTES = 256 << 20
MAX_JSON_ITEMS = 8_000_000  # a sidecar of a million samples has less than half of that
MAX_JSON_DEPTH = 100  # far below Python's recursion limit, which whoever walks or prints a value would meet
# What the system says of a name at which no such thing can be: it is lost, and not merely out of reach.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EINVAL, errno.ENAMETOOLONG)

_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # of <fcntl.h> and <stdio.h>, Linux and macOS


class HeldLock:
    """An exclusive lock on a file or directory, held until ``release`` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Give the lock back; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def try_lock(path: Path) -> HeldLock | None:
    """Lock a file or directory; None if another writer holds it, it is gone, or the file system cannot lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    lock = HeldLock(descriptor)
    # Between open and lock a cleaner may have removed it: then we hold the lock of a nameless inode.
    try:
        same = os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        same = False
    if not same:
        lock.release()
        return None
    return lock


@contextlib.contextmanager
def hold_folder(folder: Path, *, busy: str, alone: bool = True) -> Iterator[None]:
    """Hold a folder for this process: alone, or with any number of others that do not want it alone.

    A folder that takes another one's place at that moment counts as held by somebody else.

    Args:
        folder: Nothing is held if it is not there, or on file systems without ``flock``.
        busy: The error's text if another process is in the way.

    Raises:
        ConfigError: With this text.
    """
    try:
        lock = HeldLock(descriptor := os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:  # writing to it will say what is wrong
        yield
        return
    try:
        with contextlib.suppress(OSError):  # no locks here
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{folder}: {busy}") from None
            if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):  # noqa: PTH116 - beside os.fstat
                raise ConfigError(f"{folder}: {busy}")
        yield
    finally:
        lock.release()


def create_temporary(final: Path, *, directory: bool = False) -> tuple[Path, HeldLock | None]:
    """Create an empty, locked temporary file or directory beside ``final``.

    Returns:
        Its path and its lock; no lock on file systems without ``flock``.
    """
    while True:
        name = f"{TEMPORARY_PREFIX}{final.name}-{os.getpid()}-{os.urandom(4).hex()}"
        path = final.with_name(name)
        with name_written(final, path):
            if directory:
                path.mkdir()
            else:
                path.touch(exist_ok=False)
        lock = try_lock(path)
        # A cleaner that came between creation and lock took it for a leftover: try again.
        if lock is not None or path.exists():
            return path, lock


@contextlib.contextmanager
def temporary_for(final: Path, *, directory: bool = False) -> Iterator[Path]:
    """Give a locked temporary file or directory beside ``final``; what is left of it at the end is removed.

    Raises:
        OSError: If it cannot be made or written; names ``final``, and, of a full disk, what to do (`NoRoomError`).
    """
    temporary, lock = create_temporary(final, directory=directory)
    try:
        with name_written(final, temporary):
            yield temporary
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)
        if lock is not None:
            lock.release()


def clean_stale(directory: Path, name: str = "") -> list[Path]:
    """Remove temporary files and folders that killed writers left in ``directory``.

    Args:
        directory: Where to look, not recursively; may be missing.
        name: Only temporaries of targets whose name starts with this.
    """
    removed: list[Path] = []
    prefix = TEMPORARY_PREFIX + name
    if not directory.is_dir():
        return removed
    for path in sorted(directory.iterdir()):
        if path.name.startswith(prefix) and (lock := try_lock(path)) is not None:
            remove(path)
            lock.release()
            removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Remove a file, or a directory with all it holds; missing is fine, links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write a file and fsync it; not atomic. For temporary files and what is inside temporary folders."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish_file(temporary: Path, final: Path, *, create_only: bool = False) -> None:
    """Rename an fsynced temporary file to its final name and make the name durable.

    Raises:
        FileExistsError: If ``create_only`` and ``final`` is there; the temporary file stays.
    """
    if create_only:
        try:
            os.link(temporary, final)  # unlike rename, fails if the name is taken, in one step
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            if final.exists():
                raise FileExistsError(errno.EEXIST, "already published", str(final)) from None
            temporary.replace(final)  # no hard links here (some network mounts)
        temporary.unlink(missing_ok=True)
    else:
        temporary.replace(final)
    fsync_directory(final.parent)


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Fill a directory that appears under its final name whole, or, after an error, not at all.

    Its files may be written by libraries: they are flushed to the disk here, and readable by whom the directory is.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with temporary_for(final, directory=True) as temporary:
        yield temporary
        readable = temporary.stat().st_mode & 0o666  # as the umask made it; safetensors writes for the owner alone
        for path in filter(Path.is_file, temporary.rglob("*")):
            path.chmod(path.stat().st_mode | readable)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        publish_directory(temporary, final)


def publish_directory(temporary: Path, final: Path) -> None:
    """Rename a temporary directory of fsynced files to its final name; always create-only.

    Raises:
        FileExistsError: If ``final`` is there; the temporary directory stays.
    """
    for folder, _, _ in os.walk(temporary, topdown=False):
        fsync_directory(temporary.__class__(folder))
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, "already published", str(final)) from None
        raise
    fsync_directory(final.parent)


def exchange_folders(one: Path, other: Path) -> None:
    """Let two folders of one disk take each other's names, in one step: nobody ever finds neither, or half of one.

    Raises:
        OSError: If the system cannot (network file systems, mount points); nothing has changed then.
    """
    import ctypes

    names, libc = (os.fsencode(one), os.fsencode(other)), ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(*names, _RENAME_SWAP)
        else:
            failed = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    except AttributeError as error:  # a C library without it
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one)) from error
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one))
    fsync_directory(one.parent)


def write_bytes_atomic(path: Path, data: bytes | bytearray, *, create_only: bool = False) -> None:
    """Write a whole file or nothing, durably.

    Raises:
        FileExistsError: If ``create_only``, the file is there, and it holds other bytes. The same bytes
            are success: two processes that agree are no conflict.
    """
    with temporary_for(path) as temporary:
        write_durably(temporary, data)
        try:
            publish_file(temporary, path, create_only=create_only)
        except FileExistsError:
            if not create_only or path.read_bytes() != data:
                raise


def write_stream_atomic(path: Path, source: IO[bytes]) -> None:
    """As `write_bytes_atomic`, what is left of an open file, which is not held in memory."""
    with temporary_for(path) as temporary:
        with temporary.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        publish_file(temporary, path)


def is_out_of_reach(error: BaseException) -> bool:
    """Whether an error tells that the system did not let something be read (mode, owner, disk), which may be sound."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    # Libraries raise OSErrors of their own for damaged bytes, without a number.
    return cause is not None and cause.errno is not None and cause.errno not in _NOT_THERE


def json_bytes(value: Any) -> bytes:
    """Return the bytes that ``write_json_atomic`` writes: sorted keys, indented, one final newline."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def write_json_atomic(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, atomically; equal values give equal bytes."""
    write_bytes_atomic(path, json_bytes(value))


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file of bounded size; NaN and Infinity are refused.

    Raises:
        FileNotFoundError: If it is not there.
        CacheFormatError: If it is no regular file, too large, or not JSON in UTF-8.
    """
    return parse_json(read_bounded(path, max_bytes=max_bytes), str(path))


def read_bounded(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a regular file of bounded size.

    Raises:
        FileNotFoundError: If it is not there.
        CacheFormatError: If it is no regular file, cannot be read, or is too large.
    """
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise CacheFormatError(f"{path}: not a regular file; expected a plain file, no link, folder or device")
        with path.open("rb") as file:
            # So many bytes are asked for as there are: all that is asked for is allocated first.
            data = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CacheFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise CacheFormatError(f"{path}: larger than {max_bytes} bytes; not a file of a cache")
    return data


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON in UTF-8; NaN and Infinity are refused.

    Raises:
        CacheFormatError: If it is not JSON, or has more than ``MAX_JSON_ITEMS`` values: each costs some 64 bytes of
            memory, however few it takes in the file; or is nested deeper than ``MAX_JSON_DEPTH``.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_JSON_ITEMS:
        raise CacheFormatError(f"{where}: more than {MAX_JSON_ITEMS} values; not a file of a cache")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        # Of a longer whole number Python says how to lift its limit, which is there for a reason.
        why = "a whole number of thousands of digits" if "set_int_max_str_digits" in str(error) else error
        raise CacheFormatError(f"{where}: not valid JSON ({why}); the file is damaged") from error
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise CacheFormatError(
            f"{where}: nested deeper than {MAX_JSON_DEPTH} levels; no file of a cache is: copy it again from where "
            "it came from"
        )
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested in more than ``limit`` levels; goes level by level, without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")

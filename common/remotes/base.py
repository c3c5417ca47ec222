"""What a place that holds caches must be able to do: six small methods, the same for every kind of place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path


class Remote(Protocol):
    """A folder of files somewhere else. Names are relative POSIX paths; safe to use from several threads.

    Every method retries what may pass by itself, and then raises ``TransferError`` with the address, what
    happened and what to do.

    Attributes:
        location: The address, for people; secrets in it are left out.
        upload_files: How many files one call to ``upload`` should hold at least: many where each call is a commit.
        upload_jobs: How many calls to ``upload`` may run at once.
    """

    location: str
    upload_files: int
    upload_jobs: int

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Return a small file whole.

        Raises:
            FileNotFoundError: If it is absent.
            CacheFormatError: If it is larger than ``max_bytes``; no more than that is held in memory.
        """

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None if it is absent."""

    def download(self, name: str, target: Path, *, size: int, on_bytes: Callable[[int], object] | None = None) -> None:
        """Append to ``target`` what is still missing of a file, until ``target`` has ``size`` bytes.

        What is there already is not fetched again and not checked: the caller compares digests at the end.

        Args:
            name: Of the file.
            target: A local file, or nothing yet; longer than ``size`` means begin again.
            size: Bytes of the whole file.
            on_bytes: Called with the number of new bytes after each block.

        Raises:
            FileNotFoundError: If the file is absent.
        """

    def upload(self, files: Mapping[str, Path], *, on_bytes: Callable[[int], object] | None = None) -> None:
        """Copy whole local files here, each visible only when whole, in an order in which the last comes last.

        Raises:
            TransferError: Also where nothing can be written.
        """

    def create(self, name: str, data: bytes) -> bool:
        """Write a small new file.

        Returns:
            False, without a change, if there is a file of that name already.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Remove files in this order; absent ones are fine."""

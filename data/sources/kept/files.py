"""Entries of one file: their ids and where they lie are found once, and kept of a large file, and so is its survey."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vlm_distill_cache.data.sample import Survey
from vlm_distill_cache.data.sources.entries import EntryDataset
from vlm_distill_cache.data.sources.kept.entries import KeptEntries
from vlm_distill_cache.data.sources.kept.ids import KeptIds
from vlm_distill_cache.data.sources.kept.store import KEPT_FROM, Kept, stamp_of
from vlm_distill_cache.data.sources.kept.surveys import kept_survey


class FileDataset(EntryDataset):
    """The entries of a file."""

    def __init__(
        self, path: Path, *, image_root: Path, kind: str, find: Callable[[Path], Kept], in_parts: bool
    ) -> None:
        """Find the entries, or what is kept of them.

        Args:
            kind: What the file holds, for what is kept.
            find: Looks at all entries; picklable.
            in_parts: Whether entries are read from the file as it stands, not from a copy in memory.
        """
        self.name = path.name
        self.image_root = image_root
        self._of = [str(image_root.absolute()), _made_of(kind, path)] if in_parts else None
        is_large = in_parts and path.stat().st_size >= KEPT_FROM
        self._entries = KeptEntries(partial(_made_of, kind, path) if is_large else None, partial(find, path))
        self.sample_ids, self.odd_ids = KeptIds(self._entries), self._entries.odd

    def made_of(self) -> Any:
        """The folder of its pictures and the file; None of one that is held in memory."""
        return self._of

    def survey(self) -> Survey:
        """As of all data; of a large file what was found once is kept."""
        return super().survey() if self._entries.of is None else kept_survey(self, self._of)


def _made_of(kind: str, path: Path) -> list[Any]:
    return [kind, stamp_of(path)]

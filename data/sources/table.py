"""Tables: every row is an entry, as in a JSON file; its columns are named alike.

Pictures are taken as the stored bytes and decoded by `data.images.load`, so that every format is decoded alike. What
`datasets` says of a column's type counts where the data tell it: pictures under any name, labels by their names.
"""

import posixpath
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import Same, Values, number_names, resolve_ids
from vlm_distill_cache.data.sources.conversations import FORMS, Conversation, are_columns
from vlm_distill_cache.data.sources.entries import ID_KEYS, SOURCE_KEYS, EntryDataset
from vlm_distill_cache.data.sources.kept.entries import KeptEntries, pack_entries
from vlm_distill_cache.data.sources.kept.ids import KeptIds
from vlm_distill_cache.data.sources.kept.store import Kept
from vlm_distill_cache.data.sources.pictures import says_none

NEEDED = "pip install 'vlm-distill-cache[hf]'"
_UNREAD = {"Pdf", "Array3D", "Array4D"}  # types whose content shows something


class RowIds(Values[str]):
    """The ids of rows without one: their numbers."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def at(self, index: int) -> str:
        """One id."""
        return f"row-{index:08d}"


class Table(Protocol):
    """Rows that can be read in any order, picklable.

    Attributes:
        columns: Names of the columns.
        features: Types of columns as `datasets` describes them; None or no entry where nothing is said.
        texts: Columns of texts.
    """

    columns: Sequence[str]
    features: Mapping[str, Any]
    texts: frozenset[str]

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]:
        """One row, as Python values."""
        ...

    def column(self, name: str) -> list[Any]:
        """All values of a column."""
        ...


class TableDataset(EntryDataset):
    """The rows of a table; relative image paths start from ``image_root``."""

    def __init__(
        self, table: Table, *, name: str, where: str, image_root: Path, made_of: Callable[[], Any] | None = None
    ) -> None:
        """Look at columns and ids.

        Args:
            made_of: Says what the rows are made of, as of `KeptEntries`.
        """
        self.name = name
        self.image_root = image_root
        self._table = table
        columns = list(table.columns)
        kinds = {column: _kinds_in(table.features.get(column)) for column in columns}
        self.picture_keys = frozenset(column for column in columns if "Image" in kinds[column])
        self.video_keys = frozenset(column for column in columns if "Video" in kinds[column])
        self._unread = {column: kind for column in columns for kind in _UNREAD & kinds[column]}
        self._labels = {column: table.features[column] for column in columns if "ClassLabel" in kinds[column]}
        if not are_columns(columns, pictures=bool(self.picture_keys)):
            raise DataError(f"{where}: expected columns {FORMS}; it has {columns}")
        named = next((column for column in ID_KEYS if column in columns), None)
        self.sample_ids: Sequence[str]
        self.odd_ids: Mapping[int, str]
        if named is None:  # numbered: their content would have to be read in full to hash it
            self.sample_ids, self.odd_ids = RowIds(len(table)), {}
        else:
            entries = KeptEntries(made_of, partial(_find, table, named, where))
            self.sample_ids, self.odd_ids = KeptIds(entries), entries.odd
        self.tell_unread()

    def read(self, index: int) -> Mapping[str, Any]:
        """The row at ``index``, labels by their names."""
        try:
            row = self._table.row(index)
            return row | {column: _names(row[column], feature) for column, feature in self._labels.items()}
        except DataError:
            raise
        except (
            ValueError,
            TypeError,
            OverflowError,
        ) as error:  # a time or number that Python cannot hold; text not UTF-8
            raise SampleError(f"the row cannot be read: {error}") from error

    def refuse_text_only(self, index: int, entry: Mapping[str, Any], said: Conversation) -> None:
        """As for every entry; a column of pages is one, whatever its name, and so on."""
        for column, kind in self._unread.items():
            if not says_none(entry[column]):
                raise SampleError(
                    f"column {column!r} holds a {kind}; only pictures and videos are read, from columns of type Image and Video"
                )
        super().refuse_text_only(index, entry, said)

    def image_keys(self) -> Sequence[str | None]:
        """The path of each row's image or video, where a column of texts names it; None where they are stored."""
        if {"image", "images", "video", "videos"} & self._table.texts:
            return super().image_keys()
        return Same(None, len(self))

    def sources(self) -> NDArray[np.int64]:
        """By a column of texts or labels that says so, else by the folders of pictures, where a column of texts names these."""
        named = next((key for key in SOURCE_KEYS if key in self._table.texts or key in self._labels), None)
        if named is not None:
            return number_names(self._table.column(named))
        return number_names(key and posixpath.dirname(key) for key in self.image_keys())


def _find(table: Table, named: str, where: str) -> Kept:
    """Look at all ids."""
    ids, odd = resolve_ids(((row, index) for index, row in enumerate(table.column(named))), where=where)
    return pack_entries(ids, odd, notes={})


def by_name(value: Any, feature: Any) -> Any:
    """A label by its name, or those in a list, where a column holds labels; else the value as it stands.

    Raises:
        ValueError: A label has no name.
    """
    return _names(value, feature) if "ClassLabel" in _kinds_in(feature) else value


def _kinds_in(feature: Any) -> set[str]:
    """Names of the types in a column, those in lists of it included; not those in texts' parts."""
    inner = getattr(feature, "feature", None)
    return {type(feature).__name__} | (_kinds_in(inner) if inner is not None and not isinstance(inner, dict) else set())


def _names(value: Any, feature: Any) -> Any:
    """The name of a label, or the names in a list; a label that is missing stays None."""
    if isinstance(value, list):
        return [_names(item, feature.feature) for item in value]
    return value if not isinstance(value, int) or value < 0 else feature.int2str(value)

"""Folders written by Hugging Face `datasets` (``save_to_disk``), read row by row, and never written to.

A row is an entry, as in a JSON file; its columns are named alike. Pictures are taken as the stored bytes and decoded
by `data.images.load`, so that every format is decoded alike. Rows come straight from the Arrow file: telling the
library to leave pictures encoded makes it write a second copy of lists of them beside the data.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import resolve_ids
from vlm_distill_cache.data.sources.conversations import FORMS, are_columns
from vlm_distill_cache.data.sources.entries import EntryDataset
from vlm_distill_cache.data.sources.pictures import says_none

logger = logging.getLogger(__name__)

HELD_OUT = ("validation", "test")
_ID_COLUMNS = ("id", "sample_id", "question_id")
_UNREAD = {"Video", "Pdf", "Array3D", "Array4D"}  # types whose content shows something


class HuggingFaceDataset(EntryDataset):
    """A `datasets` folder: one data set, or several splits of which one is taken.

    Relative image paths start from ``images``, or from the folder itself.
    """

    def __init__(self, path: Path, *, split: str = "train", images: Path | None = None) -> None:
        self.name = path.name
        self.image_root = images or path
        self._table = _load_table(path, split)
        columns = self._table.column_names
        kinds = {column: _kinds_in(feature) for column, feature in self._table.features.items()}
        self.picture_keys = frozenset(column for column in columns if "Image" in kinds[column])
        self._unread = {column: kind for column in columns for kind in _UNREAD & kinds[column]}
        self._labels = {
            column: feature for column, feature in self._table.features.items() if "ClassLabel" in kinds[column]
        }
        if not are_columns(columns, pictures=bool(self.picture_keys)):
            raise DataError(f"{path}: expected columns {FORMS}; it has {columns}")
        named = [column for column in _ID_COLUMNS if column in columns]
        # Rows without an id are numbered: their content would have to be read in full to hash it.
        rows: Sequence[Any] = (
            self._table.select_columns(named[:1])[:].column(0).to_pylist()
            if named
            else [f"row-{index:08d}" for index in range(len(self._table))]
        )
        self.sample_ids, self.odd_ids = resolve_ids(((row, index) for index, row in enumerate(rows)), where=str(path))
        self.tell_unread()

    def read(self, index: int) -> Mapping[str, Any]:
        """The row at ``index``, labels by their names."""
        try:
            row: dict[str, Any] = self._table[index].to_pylist()[0]
            return row | {column: _names(row[column], feature) for column, feature in self._labels.items()}
        except (
            ValueError,
            TypeError,
            OverflowError,
        ) as error:  # a time or number that Python cannot hold; text not UTF-8
            raise SampleError(f"the row cannot be read: {error}") from error

    def refuse_text_only(self, index: int, entry: Mapping[str, Any]) -> None:
        """As for every entry; a column of videos is one, whatever its name, and so on."""
        for column, kind in self._unread.items():
            if not says_none(entry[column]):
                raise SampleError(
                    f"column {column!r} holds a {kind}; only pictures are read, from columns of type Image"
                )
        super().refuse_text_only(index, entry)

    def image_keys(self) -> Sequence[str | None]:
        """Each row's image path, where a column of texts names it; None where pictures are stored."""
        for column in ("image", "images"):
            if getattr(self._table.features.get(column), "dtype", None) == "string":
                return super().image_keys()
        return [None] * len(self)


def _kinds_in(feature: Any) -> set[str]:
    """Names of the types in a column, those in lists of it included; not those in texts' parts."""
    inner = getattr(feature, "feature", None)
    return {type(feature).__name__} | (_kinds_in(inner) if inner is not None and not isinstance(inner, dict) else set())


def _names(value: Any, feature: Any) -> Any:
    """The name of a label, or the names in a list; a label that is missing stays None."""
    if isinstance(value, list):
        return [_names(item, feature.feature) for item in value]
    return value if value is None or value < 0 else feature.int2str(value)


def is_saved_dataset(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def _load_table(path: Path, split: str) -> Any:
    try:
        import datasets  # an extra, slow to import
    except ImportError as error:
        raise DataError(
            f"{path} is a Hugging Face data set, which needs an extra: pip install 'vlm-distill-cache[hf]'"
        ) from error
    try:
        if (path / "dataset_dict.json").is_file():
            path = _folder_of(split, path)
        loaded = datasets.load_from_disk(str(path))
    except DataError:
        raise
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        raise DataError(
            f"{path} cannot be read as a folder of datasets.save_to_disk: {error} (if it holds no row, there is nothing to "
            "learn)"
        ) from error
    return loaded.with_format("arrow")


def _folder_of(split: str, path: Path) -> Path:
    """The folder of one split, which is opened alone: another one may be empty, which the library cannot open."""
    splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
    if split in HELD_OUT and split not in splits and "train" in splits:
        split = "train"  # as a file without splits is
    if len(splits) > 1:
        logger.info("%s: split %r is read, of %s", path, split, ", ".join(map(repr, splits)))
    if split not in splits:
        raise DataError(f"{path} has no split {split!r}; it has {sorted(splits)}: name one, DATA={path / splits[0]}")
    return path / split

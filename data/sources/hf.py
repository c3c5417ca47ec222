"""Folders written by Hugging Face `datasets` (``save_to_disk``), read row by row.

Columns, by name: ``image`` or ``images``; ``messages``, ``conversations``, ``question`` and ``answer``, or
``caption``; ``id``. Pictures are taken as the stored bytes and decoded by `data.images.load`, so that every
format is decoded alike.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.images.load import ImageBytes
from vlm_distill_cache.data.sample import ImageSource, Turn, resolve_ids
from vlm_distill_cache.data.sources.grouping import key_of_paths
from vlm_distill_cache.data.sources.llava import EntryDataset, find_images
from vlm_distill_cache.data.sources.messages import parse_record

_ID_COLUMNS = ("id", "sample_id", "question_id")
_TEXT_COLUMNS = ("messages", "conversations", "question", "caption")


class HuggingFaceDataset(EntryDataset):
    """A `datasets` folder: one data set, or several splits of which one is taken.

    Relative image paths start from ``images``, or from the folder itself.
    """

    def __init__(self, path: Path, *, split: str = "train", images: Path | None = None) -> None:
        self.name = path.name
        self._path = path
        self._images = images or path
        self._table = _load_table(path, split)
        columns = self._table.column_names
        if not any(column in columns for column in _TEXT_COLUMNS):
            raise DataError(f"{path}: none of the columns {list(_TEXT_COLUMNS)} found; it has {columns}")
        named = [column for column in _ID_COLUMNS if column in columns]
        # Rows without an id are numbered: their content would have to be read in full to hash it.
        rows = self._table[named[0]] if named else [f"row-{index:08d}" for index in range(len(self._table))]
        self.sample_ids: Sequence[str] = resolve_ids(((row, index) for index, row in enumerate(rows)), where=str(path))

    def read(self, index: int) -> tuple[Mapping[str, Any], tuple[Turn, ...], tuple[ImageSource, ...]]:
        """The row at ``index``, its turns and its images."""
        row = self._table[index]
        turns, named = parse_record(row)
        stored = row.get("image") if row.get("image") is not None else row.get("images")
        return row, turns, self._find(stored, named, self.sample_ids[index])

    def image_keys(self) -> list[str | None]:
        """Each row's image path, where a column of texts names it; None where pictures are stored."""
        for column in ("image", "images"):
            feature = self._table.features.get(column)
            if getattr(feature, "dtype", None) == "string":
                return [key_of_paths(value) for value in self._table[column]]
        return [None] * len(self)

    def _find(self, stored: Any, named: list[str], sample_id: str) -> tuple[ImageSource, ...]:
        if stored is None:
            return find_images(named, self._images)
        found: list[ImageSource] = []
        for item in stored if isinstance(stored, list) else [stored]:
            if isinstance(item, Mapping):
                if item.get("bytes"):
                    found.append(ImageBytes(item["bytes"], f"{self._path.name}, row {sample_id!r}"))
                else:
                    found += find_images(item.get("path"), self._images)
            else:
                found += find_images(item, self._images)
        return tuple(found)


def is_saved_dataset(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _load_table(path: Path, split: str) -> Any:
    try:
        import datasets  # an extra, slow to import
    except ImportError as error:
        raise DataError(
            f"{path} is a Hugging Face data set, which needs an extra: pip install 'vlm-distill-cache[hf]'"
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a folder of datasets.save_to_disk: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path} has no split {split!r}; it has {sorted(loaded)}")
        loaded = loaded[split]
    for column, feature in loaded.features.items():
        plain = datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(column, plain)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            loaded = loaded.cast_column(column, datasets.List(plain))
    return loaded

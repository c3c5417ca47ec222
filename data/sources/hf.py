"""Folders written by Hugging Face `datasets` (``save_to_disk``), read row by row, and never written to.

Rows come straight from the Arrow file: telling the library to leave pictures encoded makes it write a second copy of
lists of them beside the data.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.sources.table import NEEDED, TableDataset

logger = logging.getLogger(__name__)

HELD_OUT = ("validation", "test")


class ArrowTable:
    """A table of `datasets`, as it lies on disk; attributes as of `data.sources.table.Table`."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded.with_format("arrow")
        self.columns: Sequence[str] = self._loaded.column_names
        self.features: Mapping[str, Any] = self._loaded.features
        self.texts = frozenset(
            column for column, feature in self.features.items() if getattr(feature, "dtype", None) == "string"
        )

    def __len__(self) -> int:
        return len(self._loaded)

    def row(self, index: int) -> dict[str, Any]:
        """One row."""
        row: dict[str, Any] = self._loaded[index].to_pylist()[0]
        return row

    def column(self, name: str) -> list[Any]:
        """All values of a column."""
        values: list[Any] = self._loaded.select_columns([name])[:].column(0).to_pylist()
        return values


class HuggingFaceDataset(TableDataset):
    """A `datasets` folder: one data set, or several splits of which one is taken.

    Relative image paths start from ``images``, or from the folder itself.
    """

    def __init__(self, path: Path, *, split: str = "train", images: Path | None = None) -> None:
        super().__init__(
            ArrowTable(_load_folder(path, split)), name=path.name, where=str(path), image_root=images or path
        )


class ArrowDataset(TableDataset):
    """The Arrow files of a `datasets` folder or cache, without the files that describe it; ``root`` as for others."""

    def __init__(self, paths: Sequence[Path], *, name: str, image_root: Path) -> None:
        try:
            import datasets  # an extra, slow to import

            loaded = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths])
        except ImportError as error:
            raise DataError(f"{paths[0]} is an Arrow table, which needs an extra: {NEEDED}") from error
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            raise DataError(f"{paths[0]} cannot be read as an Arrow table of datasets: {error}") from error
        super().__init__(ArrowTable(loaded), name=name, where=str(paths[0]), image_root=image_root)


def is_saved_dataset(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def choose_split(split: str, splits: Sequence[str], *, where: str) -> str:
    """The split that is read: the one asked for; a held-out one that is not there means the training data, as of a file.

    Raises:
        DataError: There is no such split.
    """
    if split in HELD_OUT and split not in splits and "train" in splits:
        split = "train"  # as a file without splits is
    if len(splits) > 1 and split in splits:
        logger.info("%s: split %r is read, of %s", where, split, ", ".join(map(repr, splits)))
    return split


def _load_folder(path: Path, split: str) -> Any:
    try:
        import datasets  # an extra, slow to import
    except ImportError as error:
        raise DataError(f"{path} is a Hugging Face data set, which needs an extra: {NEEDED}") from error
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
    return loaded


def _folder_of(split: str, path: Path) -> Path:
    """The folder of one split, which is opened alone: another one may be empty, which the library cannot open."""
    splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
    split = choose_split(split, splits, where=str(path))
    if split not in splits:
        raise DataError(f"{path} has no split {split!r}; it has {sorted(splits)}: name one, DATA={path / splits[0]}")
    return path / split

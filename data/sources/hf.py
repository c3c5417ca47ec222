"""Folders written by Hugging Face `datasets` (``save_to_disk``), read row by row, and never written to.

Rows come straight from the Arrow file: telling the library to leave pictures encoded makes it write a second copy of
lists of them beside the data.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.data.sources.table import NEEDED, TableDataset

logger = logging.getLogger(__name__)

SPLIT_WORDS = {  # as `datasets` names splits by files
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


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

    def __init__(self, path: Path, *, split: str = "train", strict: bool = False, images: Path | None = None) -> None:
        """Open; a held-out split that is not there is another one (`choose_split`) unless ``strict``."""
        loaded, self.split = _load_folder(path, split, strict=strict)
        super().__init__(ArrowTable(loaded), name=path.name, where=str(path), image_root=images or path)


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
    """The split that is read: the one asked for, if it is there.

    For a held-out one that is not there it is one of its other names, for a test also the validation data, so that
    nobody is asked what was learnt; else the training data, as of a file, which has no splits.
    """
    asked = split
    if split in ("validation", "test") and split not in splits:
        words = SPLIT_WORDS[split] + (SPLIT_WORDS["validation"] if split == "test" else ())
        found = [name for word in words for name in splits if _first_word(name) == word]
        split = next(iter(found), "train" if "train" in splits else split)
    if len(splits) > 1 and split in splits:
        instead = f" instead of {asked!r}, which is not there" if split != asked else ""
        logger.info("%s: split %r is read%s, of %s", where, split, instead, ", ".join(map(repr, splits)))
    return split


def no_such_split(split: str, splits: Sequence[str], where: str) -> tuple[str, str]:
    """What to say where a split is not there, up to what to type; and which one to name there, no held-out one first."""
    held_out = {*SPLIT_WORDS["validation"], *SPLIT_WORDS["test"]}
    tests = SPLIT_WORDS["test"]
    ordered = sorted(splits, key=lambda name: (_first_word(name) in held_out, _first_word(name) in tests))
    remedy = "name one"
    if split not in held_out and _first_word(ordered[0]) in held_out:
        remedy = "all are held out; to learn from one all the same, name it"
    return f"{where} has no split {split!r}; it has {', '.join(sorted(splits))}: {remedy}", ordered[0]


def says_split(name: str, split: str) -> bool:
    """Whether a name of data, or of a split, says that it is this split, or what `choose_split` reads in its place."""
    words = SPLIT_WORDS.get(split, (split,)) + (SPLIT_WORDS["validation"] if split == "test" else ())
    return re.search(rf"(^|[^a-z])({'|'.join(map(re.escape, words))})([^a-z]|$)", name.lower()) is not None


def _first_word(split: str) -> str:
    return re.split(r"[^a-z]+", split.lower().lstrip("_-."))[0]


def _load_folder(path: Path, split: str, *, strict: bool) -> tuple[Any, str | None]:
    """The data, and which split of several they are, or which held-out one they say to be."""
    try:
        import datasets  # an extra, slow to import
    except ImportError as error:
        raise DataError(f"{path} is a Hugging Face data set, which needs an extra: {NEEDED}") from error
    try:
        if (path / "dataset_dict.json").is_file():
            path = _folder_of(split, path, strict=strict)
            read: str | None = path.name
        else:
            read = _stated_split(split, path, strict=strict)
        loaded = datasets.load_from_disk(str(path))
    except DataError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as a folder of datasets.save_to_disk: {error} (if it holds no row, there is nothing to "
            "learn)"
        ) from error
    return loaded, read


def _stated_split(split: str, path: Path, *, strict: bool) -> str | None:
    stated = str(json.loads((path / "state.json").read_bytes()).get("_split") or "")
    if strict and split not in ((stated,) if stated else (path.name, "train")):
        raise DataError(f"{path} is one data set, without a split {split!r}; leave out split=")
    return None if stated in ("", "train") else stated  # what was cut from training data says "train", too


def _folder_of(split: str, path: Path, *, strict: bool) -> Path:
    """The folder of one split, which is opened alone: another one may be empty, which the library cannot open."""
    splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
    split = split if strict else choose_split(split, splits, where=str(path))
    if not splits:
        raise DataError(f"{path} has no split, so that there is nothing to learn")
    if split not in splits:
        said, named = no_such_split(split, splits, str(path))
        raise DataError(f"{said}, {by_make('DATA=', '--data ')}{path / named}")
    return path / split

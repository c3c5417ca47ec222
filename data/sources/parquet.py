"""Parquet files, as the hub serves its data sets and as pandas writes them, read row group by row group.

The first file's `datasets` metadata says which columns are pictures and what labels mean. Without it, a column of
bytes, or of ``{"bytes", "path"}``, is one of pictures where its name or its bytes say so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.remotes.copies import RemoteFile
from vlm_distill_cache.data.sample import ImageSource, Survey, number_names
from vlm_distill_cache.data.sources.kept.store import stamp_of
from vlm_distill_cache.data.sources.kept.surveys import SHARED_FROM, kept_survey
from vlm_distill_cache.data.sources.parquet_rows import ParquetRows, ParquetSource, StoredPicture
from vlm_distill_cache.data.sources.table import NEEDED, TableDataset

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BUFFER = 8 * 2**20  # bytes of one request where a row group is not read as a whole
_PICTURES = ("image", "images")
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class LocalParquet:
    """A parquet file here."""

    path: Path
    remote = False
    remedy = "copy or download it again"

    @property
    def shown(self) -> str:
        """Its path."""
        return str(self.path)

    def stamp(self) -> list[Any]:
        """Its path, size and time."""
        return stamp_of(self.path)

    def open(
        self, metadata: "pq.FileMetaData | None", *, whole: bool, repeating: Sequence[str] = ()
    ) -> "pq.ParquetFile":
        """Map it into memory."""
        import pyarrow.parquet as pq

        if metadata is None:
            refuse_pointer(self.path)
        return pq.ParquetFile(self.path, metadata=metadata, memory_map=True, read_dictionary=list(repeating))

    def errors(self) -> tuple[type[Exception], ...]:
        """What reading it may raise."""
        import pyarrow as pa

        return (pa.ArrowException, OSError, ValueError, OverflowError)


@dataclass(frozen=True)
class HubParquet:
    """A parquet file in a data set repository of the hub, read by ranges: nothing is kept on disk.

    Attributes:
        repository: ``ORG/NAME``.
        revision: The commit.
        path: Its path in the repository.
    """

    repository: str
    revision: str
    path: str
    remote = True
    remedy = "run the same command again; what is done is kept"

    @property
    def shown(self) -> str:
        """Its address."""
        return f"hf://datasets/{self.repository}@{self.revision}/{self.path}"

    def stamp(self) -> list[Any]:
        """Its address: what a commit holds does not change."""
        return [self.shown]

    def open(
        self, metadata: "pq.FileMetaData | None", *, whole: bool, repeating: Sequence[str] = ()
    ) -> "pq.ParquetFile":
        """Open it; of whole row groups all ranges are asked for together, of others a few MB at a time."""
        import pyarrow.parquet as pq
        from huggingface_hub import HfFileSystem

        file = HfFileSystem().open(self.shown, "rb", cache_type="none")
        return pq.ParquetFile(
            file,
            metadata=metadata,
            pre_buffer=whole,
            buffer_size=0 if whole else BUFFER,
            read_dictionary=list(repeating),
        )

    def errors(self) -> tuple[type[Exception], ...]:
        """What reading it may raise, the client's errors included."""
        import pyarrow as pa
        from huggingface_hub.errors import HTTPError

        return (pa.ArrowException, OSError, ValueError, RuntimeError, HTTPError)


@dataclass(frozen=True)
class RemoteParquet:
    """A parquet file at an address, read by ranges: nothing is kept on disk."""

    file: RemoteFile
    remote = True
    remedy = "run the same command again; what is done is kept"

    @property
    def shown(self) -> str:
        """Its address."""
        return str(self.file)

    def stamp(self) -> list[Any]:
        """Its address and version."""
        return self.file.stamp()

    def open(
        self, metadata: "pq.FileMetaData | None", *, whole: bool, repeating: Sequence[str] = ()
    ) -> "pq.ParquetFile":
        """Open it; of whole row groups all ranges are asked for together, of others a few MB at a time."""
        import pyarrow.parquet as pq

        return pq.ParquetFile(
            self.file.ranges(),
            metadata=metadata,
            pre_buffer=whole,
            buffer_size=0 if whole else BUFFER,
            read_dictionary=list(repeating),
        )

    def errors(self) -> tuple[type[Exception], ...]:
        """What reading it may raise."""
        import pyarrow as pa

        return (pa.ArrowException, OSError, ValueError, OverflowError)


class ParquetTable:
    """Parquet files as a table; attributes as of `data.sources.table.Table`."""

    def __init__(self, sources: Sequence[ParquetSource]) -> None:
        try:
            import pyarrow.types as types
        except ImportError as error:
            raise DataError(f"{sources[0].shown} is a parquet file, which needs an extra: {NEEDED}") from error
        self.rows = ParquetRows(sources, pictures=picture_columns, labels=label_names)
        self.columns: Sequence[str] = self.rows.columns
        self.features: Mapping[str, Any] = _features_of(self.rows.schema)
        self.texts = frozenset(
            field.name
            for field in self.rows.schema
            if types.is_string(field.type) or types.is_large_string(field.type) or types.is_string_view(field.type)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        """One row; pictures are left unread where that is safe."""
        return self.rows.row(index)

    def column(self, name: str) -> list[Any]:
        """All values of a column."""
        return self.rows.column(name)


class ParquetDataset(TableDataset):
    """The rows of parquet files; relative image paths start from ``image_root``, which a streamed set has not.

    ``by_files``: the data are told from others by what the files' footers say, and no row is read before it is asked for.
    """

    def __init__(
        self,
        sources: Sequence[ParquetSource],
        *,
        name: str,
        where: str,
        image_root: Path | None,
        by_files: bool = False,
    ) -> None:
        self._has_folder, self._by_files = image_root is not None, by_files
        table = ParquetTable(sources)
        self._rows = table.rows
        made_of = partial(_made_of, tuple(sources))
        self._of: Any = made_of()
        is_large = len(table) >= SHARED_FROM
        super().__init__(
            table, name=name, where=where, image_root=image_root or Path(), made_of=made_of if is_large else None
        )

    def sources(self) -> NDArray[np.int64]:
        """Those of each file, told from those of the others."""
        files = np.repeat(np.arange(len(self._rows.counts)), self._rows.counts)
        return number_names(zip(files.tolist(), super().sources().tolist(), strict=True))

    def made_of(self) -> Any:
        """The folder of its pictures, the files, and which columns have types."""
        folder = str(self.image_root.absolute()) if self._has_folder else None
        return [folder, self._of, sorted(self._table.features)]

    def survey(self) -> Survey:
        """As of all data, kept of many rows; by the files alone where these tell the data from others."""
        if not self._by_files:
            return kept_survey(self, self.made_of()) if len(self) >= SHARED_FROM else super().survey()
        lists = [
            self._rows.schema.field(name).type for name in self.picture_keys | {*_PICTURES} & {*self._rows.columns}
        ]
        several = any(str(kind).startswith(("list", "large_list")) for kind in lists)
        videos = len(self) if self.video_keys else 0
        return Survey(fingerprint=fingerprint(["by files", self._rows.describe()]),
                      most_pictures=2 if several else bool(lists or videos), videos=videos)  # fmt: skip

    def find(self, value: Any, index: int, kind: str = "image") -> ImageSource:
        """A picture of the table, whose bytes are read when it is decoded, or a file that the row names."""
        if isinstance(value, StoredPicture):
            return replace(value, name=f"of {self.name}, sample {self.sample_ids[index]!r}")
        if isinstance(value, str) and not self._has_folder and not Path(value).is_absolute():
            raise SampleError(
                f"it names the {kind} {value[:100]!r}, a file beside the table, which is not streamed: leave out "
                f"streaming=true, or name its folder ({by_make('IMAGES=FOLDER, ')}--images FOLDER)"
            )
        return super().find(value, index, kind)


def _made_of(sources: Sequence[ParquetSource]) -> list[Any]:
    return ["parquet", [source.stamp() for source in sources]]


def refuse_pointer(path: Path) -> None:
    """Refuse an empty file, and what Git leaves in place of a large one."""
    with path.open("rb") as file:
        begins = file.read(len(_POINTER))
    if not begins:
        raise DataError(f"{path} is empty; copy or download it again")
    if begins == _POINTER:
        raise DataError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download the data set "
            "with `hf download ORG/NAME --repo-type dataset`"
        )


def picture_columns(schema: "pa.Schema") -> frozenset[str]:
    """Columns that hold pictures whatever is in them: by their type, else by their name."""
    features = _features_of(schema)
    typed = [name for name, feature in features.items() if type(_innermost(feature)).__name__ == "Image"]
    return frozenset([*typed, *_PICTURES])


def label_names(schema: "pa.Schema") -> dict[str, tuple[str, ...]]:
    """Columns of numbers that stand for names, with these."""
    kinds = {name: _innermost(feature) for name, feature in _features_of(schema).items()}
    return {name: tuple(kind.names or ()) for name, kind in kinds.items() if type(kind).__name__ == "ClassLabel"}


def _innermost(feature: Any) -> Any:
    while (inner := getattr(feature, "feature", None)) is not None and not isinstance(inner, dict):
        feature = inner
    return feature


def _features_of(schema: "pa.Schema") -> dict[str, Any]:
    """What `datasets` wrote of the columns into a file; empty if nothing, or nothing that this version knows."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return {}
    try:
        from datasets import Features

        described = json.loads(stored)["info"]["features"]
        return {name: feature for name, feature in Features.from_dict(described).items() if name in schema.names}
    except (ImportError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}

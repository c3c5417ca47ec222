"""The two stores, and the four steps of a shard's life: open, append, finish, read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vlm_distill_cache.common.cache.schema import Field
from vlm_distill_cache.common.cache.sidecar import FileEntry, ShardSidecar, write_sidecar
from vlm_distill_cache.common.cache.stores.base import ShardReader, ShardWriter, prepare_shard
from vlm_distill_cache.common.cache.stores.webdataset_store import WebDatasetReader, WebDatasetWriter
from vlm_distill_cache.common.cache.stores.zarr_store import ZarrReader, ZarrWriter
from vlm_distill_cache.common.errors import CacheFormatError

STORES: dict[str, tuple[type[ShardWriter], type[ShardReader]]] = {
    "zarr": (ZarrWriter, ZarrReader),
    "webdataset": (WebDatasetWriter, WebDatasetReader),
}
_SUFFIXES = (ZarrWriter.suffix, WebDatasetWriter.suffix)


def open_writer(store: str, cache_dir: Path, shard_index: int, fields: Sequence[Field]) -> ShardWriter:
    """Open a shard for writing, after removing what a killed run left of it.

    Raises:
        CacheMismatchError: If the shard is already finished.
    """
    writer, _ = _look_up(store)
    prepare_shard(cache_dir, shard_index, _SUFFIXES)
    return writer(cache_dir, shard_index, tuple(fields))


def open_reader(store: str, cache_dir: Path, shard_index: int, fields: Sequence[Field]) -> ShardReader:
    """Open a shard for reading; checks its structure, not its checksums (``TeacherCache`` does)."""
    _, reader = _look_up(store)
    return reader(cache_dir, shard_index, tuple(fields))


def finish_shard(writer: ShardWriter, failed: Iterable[tuple[str, str]] = ()) -> ShardSidecar:
    """Publish a shard and then its sidecar: from now on the shard exists.

    Args:
        failed: ``(sample_id, reason)`` of each sample that could not be read.

    Raises:
        CacheMismatchError: If another process published the same shard with other content.
    """
    try:
        files = {name: FileEntry.of(writer.cache_dir / name) for name in writer.close()}
        sidecar = ShardSidecar(
            index=writer.index,
            sample_ids=tuple(writer.sample_ids),
            rows=writer.rows,
            field_bytes=dict(writer.field_bytes),
            files=files,
            failed=tuple((name, reason) for name, reason in failed),
            pictures=writer.pictures,
            unknown=writer.unknown,
            divided=writer.divided,
            format_version=writer.format_version,
        )
        write_sidecar(writer.cache_dir, sidecar)
    finally:
        writer.abort()  # after a success only the lock is left to give back
    return sidecar


def _look_up(store: str) -> tuple[type[ShardWriter], type[ShardReader]]:
    if store not in STORES:
        raise CacheFormatError(f"store {store!r}; expected one of {', '.join(STORES)}")
    return STORES[store]

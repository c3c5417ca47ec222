"""The same cache in the other store: there and back again, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_distill_cache.common.cache.manifest import (
    CARD,
    PLAN,
    FileEntry,
    Manifest,
    read_sidecar,
    seal,
    sidecar_path,
    write_plan,
)
from vlm_distill_cache.common.cache.plan import card_store_line
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.atomic import write_bytes_atomic
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import COPY_AGAIN, file_damage

if TYPE_CHECKING:
    from collections.abc import Callable


def convert(
    source: str | Path, target: str | Path, store: str, *, on_shard: Callable[[], object] | None = None
) -> Manifest:
    """Write the same cache in the other store; back again, it is byte-identical.

    Killed and called again, it goes on with the shards that are missing.

    Args:
        source: A sealed cache.
        target: A new folder, or one that an earlier call to convert the same cache began.
        store: ``zarr`` or ``webdataset``.
        on_shard: Called after each shard, for progress.

    Returns:
        The manifest of the new cache.

    Raises:
        ConfigError: If the cache is in that store already, or one folder lies inside the other.
        CacheFormatError: If the source is not sealed or damaged.
        CacheMismatchError: If the target holds another cache.
    """
    source, target = Path(source), Path(target)
    cache = open_cache(source, open_shards=1)
    if store == cache.plan.store:
        raise ConfigError(f"{source} is a {store} cache already; copy the folder, or choose the other store")
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ConfigError(f"{target} and {source} lie inside each other; choose a folder beside the cache")
    plan = replace(cache.plan, store=store)
    write_plan(target, plan)
    for index in range(plan.shard_count):
        if not sidecar_path(target, index).exists():
            writer = open_writer(store, target, index, plan.all_fields)
            try:
                for sample_id in cache.shard_sample_ids(index):
                    writer.append(sample_id, cache.read_stored(sample_id))
                finish_shard(writer, read_sidecar(source, index).failed)
            finally:
                writer.abort()
        if on_shard is not None:
            on_shard()
    for name, entry in cache.manifest.files.items():
        if name != PLAN:
            _copy(source, target, name, entry)
    if (source / CARD).is_file():
        card = (source / CARD).read_bytes()
        old, new = card_store_line(cache.plan).encode(), card_store_line(plan).encode()
        write_bytes_atomic(target / CARD, card.replace(old, new, 1))
    return seal(target, fidelity=cache.manifest.fidelity)


def _copy(source: Path, target: Path, name: str, entry: FileEntry) -> None:
    """Copy a small file beside the shards, checked on the way."""
    if (reason := file_damage(source, name, entry)) is not None:
        raise CacheFormatError(f"{source / name}: {reason}; {COPY_AGAIN}")
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(target / name, (source / name).read_bytes())

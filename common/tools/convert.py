"""The same cache in the other store: there and back again, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vlm_distill_cache.common.cache.manifest import Manifest
from vlm_distill_cache.common.cache.plan import card_store_line
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.side_files import CARD
from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.disk import refuse_overlap
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.tools.derive import seal_derived, side_files_of, write_records, write_shards


def open_source(source: Path, target: Path, store: str) -> TeacherCache:
    """Open a cache that is to be converted; errors are those of `convert`, but for a target that holds another one."""
    cache = open_cache(source, open_shards=1)
    if store == cache.plan.store:
        raise ConfigError(f"{source} is a {store} cache already; copy the folder, or choose the other store")
    refuse_overlap(target, source)
    cache.check_side_files()
    return cache


def convert(
    source: str | Path, target: str | Path, store: str, *, on_shard: Callable[[], object] | None = None
) -> Manifest:
    """Write the same cache in the other store; back again, it is byte-identical.

    Killed and called again, it goes on with the shards that are missing.

    Args:
        target: A new folder, or one that an earlier call to convert the same cache began.

    Raises:
        ConfigError: If the cache is in that store already, or one folder lies inside the other.
        CacheFormatError: If the source is not sealed or damaged.
        CacheMismatchError: If the target holds another cache.
    """
    source, target = Path(source), Path(target)
    cache = open_source(source, target, store)
    plan = replace(cache.plan, store=store)
    card = None
    if (source / CARD).is_file():
        old, new = card_store_line(cache.plan).encode(), card_store_line(plan).encode()
        card = (source / CARD).read_bytes().replace(old, new, 1)

    def write_shard(index: int) -> None:
        # As stored: which of a shard's records hold an image's arrays stays as it is.
        records = ((sample_id, cache.read_stored(sample_id)) for sample_id in cache.shard_sample_ids(index))
        sidecar = read_sidecar(source, index)
        unknown = sidecar.unknown
        if unknown is not None and unknown.token is not None:
            unknown = replace(unknown, rows=0)  # they are counted again
        write_records(
            target, plan, index, records, sidecar.failed,
            unknown=unknown, divided=sidecar.divided, tells_pictures=sidecar.pictures is not None,
        )  # fmt: skip

    files = [(open_remote(source), side_files_of(cache.manifest, copied=True))]
    write_shards(target, plan, write_shard, side_files=files, card=card, on_shard=on_shard)
    return seal_derived(target, fidelity=cache.manifest.fidelity, copied=True)

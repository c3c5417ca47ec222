"""Where a cache's samples are in a data set: as a slow look-up in a dict says, whatever failed and however the data lie."""

import random
from pathlib import Path

import numpy as np
import pytest

from vlm_distill_cache.common.cache import placing
from vlm_distill_cache.common.cache.documents import document_bytes
from vlm_distill_cache.common.cache.index import SampleIndex, hash_ids
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import Plan, write_plan
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.sidecar import FileEntry, ShardSidecar, sidecar_path
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.opening import open_cache


def describe(folder: Path, ids: list[str], failed: set[str], *, shard_size: int) -> TeacherCache:
    """A sealed cache without records."""
    codec = LogitCodec.from_preset("default")
    plan = Plan(
        store="webdataset", sample_count=len(ids), shard_size=shard_size, signals={"logits": codec.to_dict()},
        fields={"logits": codec.fields()}, fingerprints={"data": "0" * 32},
    )  # fmt: skip
    folder.mkdir()
    write_plan(folder, plan)
    sizes = {field.name: 1 for field in plan.all_fields}
    for shard in range(plan.shard_count):
        held = [ids[place] for place in plan.shard_range(shard)]
        sidecar = ShardSidecar(
            index=shard,
            sample_ids=tuple(name for name in held if name not in failed),
            rows=len(held),
            field_bytes=sizes,
            files={f"shards/{shard:05d}.tar": FileEntry.of_bytes(b"")},
            failed=tuple((name, "a reason") for name in held if name in failed),
        )
        sidecar_path(folder, shard).write_bytes(document_bytes(sidecar.to_dict()))
    seal(folder)
    return open_cache(folder)


def slowly(cache: TeacherCache, ids: list[str]) -> list[int]:
    """Where each sample of the cache is."""
    place = {name: number for number, name in enumerate(ids)}
    return [place.get(name, -1) for name in cache.sample_ids]


@pytest.mark.parametrize("seed", range(12))
def test_places_are_those_of_a_slow_look_up(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with failures, in another order, with samples more, fewer, exchanged; in small steps, too."""
    if seed % 2:
        monkeypatch.setattr(placing, "_AT_A_TIME", 3)
        monkeypatch.setattr("vlm_distill_cache.common.cache.index._CONFIRMED_AT_A_TIME", 5)
    chance = random.Random(seed)
    ids = [f"sample/{number:03d}" for number in range(chance.randrange(20, 90))]
    failed = {name for name in ids if chance.random() < (0, 0.03, 0.3)[seed % 3]}
    cache = describe(tmp_path / "cache", ids, failed, shard_size=chance.randrange(4, 20))
    others = [
        ids, ids[::-1], chance.sample(ids, len(ids)), ids[:-1], [*ids, "more"], ["new", *ids[1:]], [*ids[1:], ids[0]],
        [*ids[:5], ids[6], ids[5], *ids[7:]],
    ]  # fmt: skip
    for data in others:
        assert cache.places_in(data).tolist() == slowly(cache, data)


def test_data_in_the_plans_order_are_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what shares a shard with a failed sample is."""
    ids = [f"sample/{number:03d}" for number in range(60)]
    cache = describe(tmp_path / "cache", ids, {ids[25]}, shard_size=10)
    asked: list[int] = []
    find = SampleIndex.find_many

    def counted(self: SampleIndex, high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked.append(len(high))
        return find(self, high, low)

    monkeypatch.setattr(SampleIndex, "find_many", counted)
    assert cache.places_in(ids).tolist() == slowly(cache, ids)
    assert asked == [10]


def test_more_than_may_be_held_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashes of very many samples are never held at once."""
    monkeypatch.setattr(placing, "_MOST_HELD", 10)
    ids = [f"sample/{number:03d}" for number in range(30)]
    cache = describe(tmp_path / "cache", ids, set(), shard_size=7)
    assert cache.places_in(ids).tolist() == [*range(30)]


def test_both_halves_of_every_hash_must_fit(tmp_path: Path) -> None:
    """Ids whose hashes share one half are other ids."""
    ids = [f"sample/{number:03d}" for number in range(30)]
    cache = describe(tmp_path / "cache", ids, set(), shard_size=10)
    index = cache._indexed()
    begins, samples = np.array([0, 10, 20]), np.array([10, 10, 10])
    high, low = hash_ids(ids)
    assert index.confirms(high, low, begins, samples)
    for half in (high, low):
        half[17] ^= np.uint64(1)
        assert not index.confirms(high, low, begins, samples)
        assert index.confirms(high, low, np.array([0, -1, 20]), samples)  # that shard is not asked about
        half[17] ^= np.uint64(1)

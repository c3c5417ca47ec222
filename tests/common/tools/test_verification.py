"""Verification finds all damage, names it, says what to do, and never crashes."""

import os
import random
import shutil

import pytest
from cache_factory import FIELDS, build_cache, make_plan, sample_id, tree

from vlm_distill_cache.common.cache.documents import document_bytes, read_document
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.side_files import CARD
from vlm_distill_cache.common.cache.sidecar import FileEntry, read_sidecar, sidecar_path
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify


@pytest.fixture
def small(whole, tmp_path):
    """One shard, one signal: quick to verify many times."""
    fields = {"logits": FIELDS["logits"]}
    plan = make_plan(open_cache(whole).plan.store, samples=5, shard_size=5, fields=fields, signals={"logits": {}})
    build_cache(tmp_path / "small", plan)
    return tmp_path / "small"


def resign(cache, index):
    """Make sidecar and manifest agree with damaged files, as an attacker would."""
    path = sidecar_path(cache, index)
    body = read_document(path)
    for name in body["files"]:
        body["files"][name] = FileEntry.of(cache / name).to_dict()
    path.write_bytes(document_bytes(body))
    seal(cache)


def test_a_sound_cache_has_no_damage(whole):
    seen = []
    assert verify(whole, on_shard=lambda: seen.append(1)) == []
    assert verify(whole, deep=True) == []
    assert len(seen) == 3


def test_every_flipped_bit_is_found_and_named(small):
    copy, rng = small, random.Random(0)
    files = [name for name in tree(copy) if name != CARD]
    for _ in range(120):
        name = rng.choice(files)
        path = copy / name
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert name in {damage.path for damage in verify(copy)}, name
        path.write_bytes(data)
    assert verify(copy) == []


def test_every_truncation_deletion_and_addition_is_found_and_named(small):
    copy, rng = small, random.Random(1)
    files = [name for name in tree(copy) if name != CARD]
    for name in rng.sample(files, min(12, len(files))):
        path = copy / name
        data = path.read_bytes()
        path.write_bytes(data[: rng.randrange(len(data))])
        assert name in {damage.path for damage in verify(copy)}
        path.unlink()
        assert name in {damage.path for damage in verify(copy)}
        path.mkdir()
        assert name in {damage.path for damage in verify(copy)}
        path.rmdir()
        path.symlink_to(os.devnull)
        assert name in {damage.path for damage in verify(copy)}
        path.unlink()
        path.write_bytes(data)
    for name in ("extra", "shards/extra", "shards/00099.json", "processor/deep/extra"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"")
        [damage] = verify(copy)
        assert str(damage) == f"{name}: belongs to no shard and no list; delete it"
        (copy / name).unlink()
    os.mkfifo(copy / "pipe")
    assert [d.path for d in verify(copy)] == ["pipe"]


@pytest.mark.slow(quick=("webdataset",))
def test_signed_damage_never_crashes(small):
    """Checksums that fit prove nothing about the content: the decoders must stand it too."""
    rng = random.Random(2)
    files = sorted(read_sidecar(small, 0).files)
    found = 0
    for _ in range(60):
        name = rng.choice(files)
        before = (small / name).read_bytes()
        data = bytearray(before)
        for _ in range(rng.choice((1, 20))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (small / name).write_bytes(data[: rng.choice((len(data), rng.randrange(1, len(data) + 1)))])
        resign(small, 0)
        found += bool(verify(small, deep=True))
        (small / name).write_bytes(before)
    assert found > 20  # some bits are padding, some are mere values


def test_unsealed_and_unfinished_caches_can_be_verified(copy):
    (copy / "manifest.json").unlink()
    [damage] = verify(copy)
    assert (damage.path, "teacher-cache seal" in damage.remedy) == ("manifest.json", True)
    sidecar_path(copy, 1).unlink()
    assert [d.path for d in verify(copy)] == ["manifest.json", "shards/00001.json"]
    (copy / "shards" / "00000.other").write_bytes(b"")
    assert "shards/00000.other" in {d.path for d in verify(copy)}
    shutil.rmtree(copy / "shards")
    assert len(verify(copy)) == 4
    (copy / "plan.json").unlink()
    assert [d.path for d in verify(copy)] == ["plan.json"]


def test_leftovers_of_killed_runs_are_reported(copy):
    (copy / "shards" / ".tmp-00001.tar-1-ab").write_bytes(b"")
    [damage] = verify(copy)
    assert "left behind by a killed run; run `teacher-cache seal` or `cachectl repair` to remove it" in str(damage)
    seal(copy)
    assert verify(copy) == []


def test_a_manifest_of_another_plan_is_found(copy, tmp_path):
    build_cache(tmp_path / "other", make_plan(open_cache(copy).plan.store, samples=20))
    shutil.copy(tmp_path / "other" / "manifest.json", copy / "manifest.json")
    reasons = " ".join(damage.reason for damage in verify(copy))
    assert "made for plan" in reasons
    assert "lists 5 shards, but the plan has 3" in reasons


def test_a_sample_in_two_shards_is_found(copy):
    path = sidecar_path(copy, 1)
    body = read_document(path)
    body["sample_ids"][0] = sample_id(0)
    path.write_bytes(document_bytes(body))
    assert any("is in shard 0 too" in damage.reason for damage in verify(copy))


def test_deep_verification_finds_wrong_values_and_counts(tmp_path):
    plan = make_plan("webdataset", teacher={"vocabulary": 3})
    build_cache(tmp_path / "a", plan)
    assert verify(tmp_path / "a") == []
    assert any("the vocabulary has 3" in d.reason for d in verify(tmp_path / "a", deep=True))
    build_cache(tmp_path / "b", make_plan("webdataset"))
    path = sidecar_path(tmp_path / "b", 0)
    body = read_document(path)
    body["rows"] += 1
    path.write_bytes(document_bytes(body))
    seal(tmp_path / "b")
    assert verify(tmp_path / "b") == []
    [damage] = verify(tmp_path / "b", deep=True)
    assert "rows" in damage.reason

"""Plan, sidecars and manifest: fixed partition, derived summary, nothing that leaves the folder."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from cache_factory import FAILED, build_cache, build_shard, make_plan, sample_id, tree

from vlm_distill_cache.common.cache.documents import document_bytes, read_document, safe_path
from vlm_distill_cache.common.cache.manifest import Manifest, read_manifest, seal
from vlm_distill_cache.common.cache.plan import Plan, read_plan, refuse_changed_plan, write_plan
from vlm_distill_cache.common.cache.schema import FORMAT_VERSION
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import (
    FileEntry,
    ShardSidecar,
    missing_shards,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.files.atomic import MAX_JSON_DEPTH
from vlm_distill_cache.common.tools.verify import verify


@pytest.fixture
def cache(tmp_path):
    build_cache(tmp_path / "cache", make_plan("webdataset"), fidelity={"kl": 0.25})
    return tmp_path / "cache"


def rewrite(path, change):
    """Edit a document as an attacker would: with a checksum that fits."""
    body = read_document(path)
    change(body)
    path.write_bytes(document_bytes(body))


def test_plans_round_trip_with_tuples_as_lists():
    plan = make_plan(geometry={"grid": (12, 12), "tiles": [(1, 2)]})
    assert plan.geometry == {"grid": [12, 12], "tiles": [[1, 2]]}
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.hash == plan.hash


def test_shards_partition_the_samples():
    plan = make_plan(samples=10, shard_size=4)
    ranges = [plan.shard_range(index) for index in range(plan.shard_count)]
    assert ranges == [range(4), range(4, 8), range(8, 10)]
    assert [p for r in ranges for p in r] == list(range(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"store": "hdf5"}, "store 'hdf5'; expected one of zarr, webdataset"),
        ({"sample_count": 0}, "sample_count is 0"),
        ({"shard_size": True}, "shard_size is True"),
        ({"sample_count": 10**6, "shard_size": 1}, "use 10 or more a shard"),
        ({"signals": {"a": {}}}, r"signals \['a'\] but fields"),
    ],
)
def test_impossible_plans_are_refused(change, message):
    with pytest.raises(CacheFormatError, match=message):
        replace(make_plan(), **change)


def test_writing_the_same_plan_again_is_fine_and_another_names_each_difference(tmp_path):
    plan = make_plan()
    write_plan(tmp_path, plan)
    before = tree(tmp_path)
    write_plan(tmp_path, plan)
    assert tree(tmp_path) == before
    other = replace(plan, shard_size=5, fingerprints={"teacher": "c" * 32})
    with pytest.raises(CacheMismatchError) as caught:
        write_plan(tmp_path, other)
    message = str(caught.value)
    assert "shard_size: the cache has 4, this run has 5" in message
    assert f"fingerprints.teacher: the cache has {'a' * 32!r}, this run has {'c' * 32!r}" in message
    assert "fingerprints.data: the cache has" in message
    assert "--overwrite" in message
    assert "sample_count" not in message
    refuse_changed_plan(plan, make_plan())
    scores = {
        "evaluation": {
            "scores": {f"kind{number}": {"value": 0.5, "low": 0.5, "high": 0.5, "items": 1} for number in range(60)}
        }
    }
    many = {f"setting{number}": number for number in range(30)}
    with pytest.raises(CacheMismatchError) as caught:
        refuse_changed_plan(replace(other, teacher=scores), replace(plan, extra=many))
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[1].startswith("  extra"), "evaluation" in str(caught.value)) == (15, True, False)
    assert re.fullmatch(r"  \.\.\. and \d+ more", lines[13])
    bigger, smaller = (replace(other, sample_count=count, fingerprints={"data": str(count) * 32}) for count in (9, 4))
    with pytest.raises(CacheMismatchError, match=r"9 samples, of .*, and 4 are asked for: if it was extended"):
        refuse_changed_plan(bigger, smaller)


def test_data_of_the_hub_that_moved_on_are_named_as_they_were():
    def plan(number, data):
        fingerprints = {"teacher": "a" * 32, "data": str(number) * 32}
        return make_plan(fingerprints=fingerprints, data={"split": "train", "limit": 0, **data})

    def of(commit, **more):
        return {"name": f"name {commit}", "repository": "org/name", "revision": commit * 40, **more}

    for more, behind in (({}, ""), ({"config": "one"}, ":name=one"), ({"file": "a.json"}, "/a.json")):
        kept = re.escape(f"DATA=org/name@{'b' * 40}{behind} (--data) goes on")
        with pytest.raises(CacheMismatchError, match=kept):
            refuse_changed_plan(plan(1, of("b", **more)), plan(2, of("c", **more)))
        refuse_changed_plan(plan(1, of("b", **more)), plan(1, of("c", **more)))  # moved on with the same samples
        with pytest.raises(CacheMismatchError) as caught:
            refuse_changed_plan(plan(1, of("b", **more)), plan(2, of("b", **more)))
        assert "goes on" not in str(caught.value)
    entries = [{"name": "x.json", "samples": 3}, of("b", samples=2), of("d", samples=2)]
    moved = [*entries[:1], of("c", samples=4), entries[2]]
    with pytest.raises(CacheMismatchError, match=f"entry 2 of the mixture was org/name@{'b' * 40}: write") as caught:
        refuse_changed_plan(plan(1, {"mixture": entries}), plan(2, {"mixture": moved}))
    assert str(caught.value).count("of the mixture was") == 1
    moved[1] |= {"samples": 2}
    refuse_changed_plan(plan(1, {"mixture": entries}), plan(1, {"mixture": moved}))


def test_the_manifest_is_derived_from_the_sidecars(cache):
    manifest = read_manifest(cache)
    sidecars = [read_sidecar(cache, i) for i in range(3)]
    assert manifest.totals == {
        "samples": 9,
        "rows": sum(s.rows for s in sidecars),
        "failed": 1,
        "pictures": 9,
        "bytes": sum(path.stat().st_size for path in (cache / "shards").glob("*.tar")),
    }
    assert manifest.plan_hash == read_plan(cache).hash
    assert manifest.files.keys() == {"index.bin", "plan.json", "processor/note.json"}
    assert manifest.fidelity == {"kl": 0.25}
    assert sidecars[0].failed == ((sample_id(FAILED), "image is truncated"),)
    assert Manifest.from_dict(manifest.to_dict(), "here") == manifest


def test_sealing_again_changes_nothing_and_keeps_the_fidelity_card(cache):
    before, hash_before = tree(cache), read_manifest(cache).hash
    assert seal(cache).hash == hash_before
    assert tree(cache) == before
    changed = seal(cache, fidelity={"kl": 0.5})
    assert changed.fidelity == {"kl": 0.5}
    assert changed.hash == hash_before  # runs stay bound to the content, however often it is measured


def test_a_cache_is_not_sealed_before_all_its_shards_are_there(tmp_path):
    plan = make_plan("webdataset", samples=40)
    write_plan(tmp_path, plan)
    build_shard(tmp_path, plan, 1)
    assert missing_shards(tmp_path, plan) == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(CacheFormatError, match=r"9 of 10 shards are missing: 0, 2-9; run `teacher-cache"):
        seal(tmp_path)
    assert not (tmp_path / MANIFEST).exists()
    with pytest.raises(CacheFormatError, match=r"not sealed .* `teacher-cache seal`"):
        read_manifest(tmp_path)


def test_sealing_removes_what_killed_runs_left(cache):
    before = tree(cache)
    (cache / ".tmp-plan.json-1-abcd").write_bytes(b"x")
    (cache / "shards" / ".tmp-00001.zarr-1-abcd").mkdir()
    seal(cache)
    assert tree(cache) == before


def test_any_flipped_bit_of_a_description_is_noticed(cache):
    readers = {"plan.json": read_plan, MANIFEST: read_manifest, "shards/00001.json": None}
    for name, reader in readers.items():
        data = (cache / name).read_bytes()
        for place in range(0, len(data), max(1, len(data) // 150)):
            for bit in (0, 5):
                flipped = bytearray(data)
                flipped[place] ^= 1 << bit
                (cache / name).write_bytes(flipped)
                with pytest.raises(CacheFormatError):
                    reader(cache) if reader else read_sidecar(cache, 1)
        (cache / name).write_bytes(data)


def test_newer_and_foreign_files_are_refused(cache):
    rewrite(cache / "plan.json", lambda body: body.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(CacheFormatError, match="format version 3, but this code reads up to 2; update"):
        read_plan(cache)
    (cache / "plan.json").write_text("[]")
    with pytest.raises(CacheFormatError, match="no format_version"):
        read_plan(cache)
    (cache / "plan.json").unlink()
    with pytest.raises(CacheFormatError, match="not a teacher cache"):
        read_plan(cache)


@pytest.mark.parametrize("depth", [MAX_JSON_DEPTH, 490, 800, 2000, 100_000])
def test_descriptions_nested_beyond_all_measure_are_refused_in_words(cache, depth):
    nested = "[" * depth + "]" * depth
    path = cache / "plan.json"
    path.write_text(path.read_text().replace('"extra": {}', f'"extra": {{"a": {nested}}}'))
    with pytest.raises(CacheFormatError, match=r"nested deeper than 100 levels|not valid JSON"):
        read_plan(cache)
    assert [(d.path, d.kind) for d in verify(cache)] == [("plan.json", "plan")]


@pytest.mark.parametrize(
    "name",
    [
        "../a",
        "/etc/passwd",
        "a/../../b",
        "a//b",
        "./a",
        "a/.",
        "",
        "a\\b",
        "c:/a",
        "a\nb",
        "a/",
        3,
        "x" * 2000,
    ],
)
def test_paths_that_could_leave_the_cache_are_refused(cache, name):
    with pytest.raises(CacheFormatError, match="could leave the cache"):
        safe_path(name, "here")
    if isinstance(name, str):
        entry = FileEntry.of_bytes(b"").to_dict()
        rewrite(cache / MANIFEST, lambda body: body["files"].update({name: entry}))
        with pytest.raises(CacheFormatError, match="could leave the cache"):
            read_manifest(cache)
        rewrite(sidecar_path(cache, 0), lambda body: body["files"].update({name: entry}))
        with pytest.raises(CacheFormatError, match="could leave the cache"):
            read_sidecar(cache, 0)


def test_sidecars_must_fit_the_plan_and_their_name(cache):
    entry = FileEntry.of_bytes(b"").to_dict()
    changes = {
        "the plan has 4": lambda body: body["failed"].pop(),
        "which is not a file of shard 0": lambda body: body["files"].update({"plan.json": entry}),
        "fields": lambda body: body["field_bytes"].pop("labels"),
        "samples is 3; expected 2;": lambda body: body["sample_ids"].pop(),
        "says it is shard 2": lambda body: body.update(index=2),
        "rows is": lambda body: body.update(rows=-1),
        r"failed\[\d\].reason is missing; expected text": lambda body: body["failed"].append({"sample_id": "x"}),
    }
    original = sidecar_path(cache, 0).read_bytes()
    for message, change in changes.items():
        rewrite(sidecar_path(cache, 0), change)
        with pytest.raises(CacheFormatError, match=message):
            seal(cache)
        sidecar_path(cache, 0).write_bytes(original)


def test_repeated_sample_ids_and_links_are_refused(cache):
    def steal(body):
        body["sample_ids"][0] = sample_id(0)

    original = sidecar_path(cache, 1).read_bytes()
    rewrite(sidecar_path(cache, 1), steal)
    with pytest.raises(CacheFormatError, match=r"in shards 0 and 1; ids must be unique"):
        seal(cache)
    sidecar_path(cache, 1).write_bytes(original)
    (cache / "projector.safetensors").symlink_to(cache / "plan.json")
    with pytest.raises(CacheFormatError, match="a link or device"):
        seal(cache)


def test_the_second_of_two_sidecars_must_say_the_same(cache):
    sidecar = read_sidecar(cache, 0)
    write_sidecar(cache, sidecar)
    with pytest.raises(CacheMismatchError, match="another process finished shard 0"):
        write_sidecar(cache, replace(sidecar, rows=sidecar.rows + 1))
    assert read_sidecar(cache, 0) == sidecar
    assert ShardSidecar.from_dict(sidecar.to_dict(), "here") == sidecar


def test_the_same_cache_in_two_folders_has_the_same_bytes(cache, tmp_path):
    build_cache(tmp_path / "other", make_plan("webdataset"), fidelity={"kl": 0.25})
    assert tree(tmp_path / "other") == tree(cache)
    shutil.rmtree(tmp_path / "other")

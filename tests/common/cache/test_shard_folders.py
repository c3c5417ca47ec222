"""Caches of many shards keep them in folders; here `many` are three. All else is as in a cache of few."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cache_factory import (
    FAILED,
    assert_equal_records,
    build_cache,
    build_shard,
    make_plan,
    make_record,
    sample_id,
    tree,
)
from servers import s3_environment

from tests.benchmarks.bench_scale import describe_cache
from vlm_distill_cache.common.cache import layout
from vlm_distill_cache.common.cache.document_rules import MAX_SHARDS
from vlm_distill_cache.common.cache.documents import document_bytes, parse_document, read_document
from vlm_distill_cache.common.cache.layout import files_of_shard, shard_folders, shard_of, shard_stem, stem_of
from vlm_distill_cache.common.cache.manifest import read_manifest, seal
from vlm_distill_cache.common.cache.plan import PLAN, planned_shards, read_plan, write_plan
from vlm_distill_cache.common.cache.side_files import MANIFEST, SINKS
from vlm_distill_cache.common.cache.sidecar import (
    check_sidecar,
    missing_shards,
    read_sidecar,
    sidecar_name,
    sidecar_path,
)
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.remotes import mirror as mirror_module
from vlm_distill_cache.common.remotes.directory import DirectoryRemote
from vlm_distill_cache.common.remotes.pull import pull
from vlm_distill_cache.common.remotes.push import push
from vlm_distill_cache.common.tools.convert import convert
from vlm_distill_cache.common.tools.merge import merge
from vlm_distill_cache.common.tools.repair import repair
from vlm_distill_cache.common.tools.select import Selection, pull_partial
from vlm_distill_cache.common.tools.verify import verify

SAMPLES, SHARD = 6, 2  # three shards: in 00 two, in 01 one
SHARDS = ["00/00000", "00/00001", "01/00002"]
STORES = ["zarr", "webdataset"]


def plan_of(store: str = "webdataset"):
    return make_plan(store, samples=SAMPLES, shard_size=SHARD)


def set_folders(monkeypatch):
    """From now on more than two shards are many, of which two lie in a folder."""
    monkeypatch.setattr(layout, "FLAT_SHARDS", 2)
    monkeypatch.setattr(layout, "FOLDER_SHARDS", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same records in caches of few shards (``flat-STORE``) and of many (``STORE``)."""
    root = tmp_path_factory.mktemp("made")
    for store in STORES:
        build_cache(root / f"flat-{store}", plan_of(store), fidelity={"kl": 0.25})
    with pytest.MonkeyPatch.context() as patch:
        set_folders(patch)
        for store in STORES:
            build_cache(root / store, plan_of(store), fidelity={"kl": 0.25})
    return root


@pytest.fixture
def folders(made, monkeypatch):
    set_folders(monkeypatch)


@pytest.fixture(params=STORES)
def cache(request, made, folders, tmp_path):
    shutil.copytree(made / request.param, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def tars(made, folders, tmp_path):
    shutil.copytree(made / "webdataset", tmp_path / "cache")
    return tmp_path / "cache"


def in_folders(name: str) -> str:
    """Where a file of a flat cache lies in one with folders."""
    return f"shards/{int(name[7:12]) // 2:02d}/{name[7:]}" if name.startswith("shards/") else name


def test_a_shard_lies_where_its_number_and_the_number_of_shards_say():
    assert shard_stem(0, 1) == "shards/00000."
    assert shard_stem(4_999, 5_000) == "shards/04999."
    assert shard_stem(0, 5_001) == "shards/00/00000."
    assert shard_stem(12_345, 12_346) == "shards/12/12345."
    assert sidecar_name(99_999, MAX_SHARDS) == "shards/99/99999.json"
    for count in (1, 5_000, 5_001, 6_000, 6_001):
        stems = [shard_stem(index, count) for index in range(count)]
        by_folder: dict[str, int] = {}
        for stem in stems:
            by_folder[stem.rpartition("/")[0]] = by_folder.get(stem.rpartition("/")[0], 0) + 1
        assert max(by_folder.values()) <= (1_000 if count > 5_000 else 5_000)
        assert {str(folder) for folder in shard_folders(Path(), count)} == {"shards", *by_folder}
        assert [shard_of(f"{stem}zarr/labels/c/0") for stem in stems] == [*range(count)]
        assert [stem_of(f"{stem}tar") for stem in stems] == stems
    for name in ("shards/00/12345.tar", "shards/012/12345.tar", "shards/12/x.tar", "plan.json", "a/shards/00000.tar"):
        assert (stem_of(name), shard_of(name)) == ("", None)


def test_all_of_a_cache_but_its_places_is_that_of_a_flat_one(cache, made):
    store = read_plan(cache).store
    flat, found = tree(made / f"flat-{store}"), tree(cache)
    assert found.keys() == {in_folders(name) for name in flat}
    assert {f"shards/{shard}.json" for shard in SHARDS} <= found.keys()
    for name, data in flat.items():
        other = found[in_folders(name)]
        if name.startswith("shards/") and name[12:] == ".json":
            body = parse_document(data, name)
            body["files"] = {in_folders(file): entry for file, entry in body["files"].items()}
            data = document_bytes(body)
        if name != MANIFEST:  # which has the sidecars' digests
            assert other == data, name
    ours, theirs = (read_manifest(folder).to_dict() for folder in (cache, made / f"flat-{store}"))
    for shard in (*ours["shards"], *theirs["shards"]):
        del shard["sidecar"]
    assert ours == theirs
    assert_reads(cache)


def assert_reads(place, store=None):
    opened = open_cache(place)
    assert len(opened) == SAMPLES - 1
    assert store in (None, opened.plan.store)
    for position in set(range(SAMPLES)) - {FAILED}:
        assert_equal_records(opened.read(sample_id(position)), make_record(position))
    opened.check_shard_files()


def test_what_killed_runs_left_is_made_anew_or_removed(cache):
    whole, plan = tree(cache), read_plan(cache)
    (cache / MANIFEST).unlink()
    sidecar_path(cache, 1).unlink()  # killed between a shard and its sidecar
    shutil.rmtree(cache / "shards/01")
    for name in ("shards/.tmp-x-1-a", "shards/00/.tmp-00001.tar-1-a", "shards/00/.tmp-00000.json-1-a"):
        (cache / name).touch()
    assert missing_shards(cache, plan) == [1, 2]
    assert [d.path for d in verify(cache) if d.kind == "missing"] == ["shards/00/00001.json", "shards/01/00002.json"]
    assert len([d for d in verify(cache) if d.kind == "leftover"]) == 3
    for index in missing_shards(cache, plan):
        build_shard(cache, plan, index)
    seal(cache, fidelity={"kl": 0.25})
    assert tree(cache) == whole
    assert not [*cache.rglob(".tmp-*")]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.slow
def test_killed_anywhere_and_resumed_the_bytes_are_the_same(tmp_path, store):
    script = Path(__file__).parents[1] / "kill_everywhere.py"
    root = script.parents[2]
    result = subprocess.run(
        [sys.executable, script, store, tmp_path, {"zarr": "29", "webdataset": "4"}[store], "1"],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{script.parent}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 5


def test_damage_to_any_file_is_found_and_mended(cache):
    whole, plan = tree(cache), read_plan(cache)
    names = [name for name in whole if name.startswith("shards/01/00002.") and whole[name]]
    for name in (*names[:: len(names) // 2], "shards/01/00002.json"):
        (cache / name).write_bytes(whole[name][:-1] + bytes([whole[name][-1] ^ 1]))
        damages = verify(cache)
        assert name in {damage.path for damage in damages}
        assert {damage.shard for damage in damages} <= {2, None}
        assert [step.path for step in repair(cache) if step.is_shard] == ["shards/01/00002.json"]
        assert not files_of_shard(cache, shard_stem(2, plan.shard_count))
        assert missing_shards(cache, plan) == [2]
        build_shard(cache, plan, 2)
        seal(cache, fidelity={"kl": 0.25})
        assert tree(cache) == whole


def test_what_lies_in_another_shards_folder_or_where_few_shards_lie_is_no_part_of_the_cache(cache):
    suffix = {"zarr": "zarr/zarr.json", "webdataset": "tar"}[read_plan(cache).store]
    names = [f"shards/00/00002.{suffix}", f"shards/00002.{suffix}", "shards/02/00002.json", "shards/00/x"]
    for name in names:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).touch()
    assert sorted((d.path, d.kind) for d in verify(cache)) == sorted((name, "stranger") for name in names)
    sidecar_path(cache, 2).unlink()
    (cache / "shards/00/00002.json").write_bytes(b"{}")
    assert missing_shards(cache, read_plan(cache)) == [2]
    repair(cache)
    assert all((cache / name).exists() for name in names)  # somebody else's
    assert not files_of_shard(cache, "shards/01/00002.")


def test_a_folder_that_is_a_link_is_refused_and_nothing_behind_it_removed(cache, tmp_path):
    (cache / "shards/01").rename(tmp_path / "away")
    (cache / "shards/01").symlink_to(tmp_path / "away")
    (tmp_path / "away/00002.json").write_bytes(b"{}")
    before = tree(tmp_path / "away")
    assert [(d.path, d.kind, d.reason[:6]) for d in verify(cache)] == [("shards/01", "plan", "a link")]
    assert [step.action for step in repair(cache)] == ["keep"]
    assert tree(tmp_path / "away") == before


@pytest.mark.parametrize(
    "name", ["shards/00/00002.tar", "shards/00002.tar", "shards/01/00001.tar", "shards/1/00002.tar", "shards/01/00002", "plan.json"]
)  # fmt: skip
def test_a_sidecar_lists_no_file_out_of_its_shards_place(tars, name):
    entry = next(iter(read_document(sidecar_path(tars, 2))["files"].values()))
    rewrite(sidecar_path(tars, 2), lambda body: body["files"].update({name: entry}))
    with pytest.raises(CacheFormatError, match=r"lists .*, which is not a file of shard 2"):
        check_sidecar(read_sidecar(tars, 2), plan_of(), "there")
    assert "shards/01/00002.json" in {damage.path for damage in verify(tars)}


@pytest.mark.parametrize(
    "name", ["shards/01/../x", "/shards/01/00002.tar", "shards/01//00002.tar", "shards/01/./00002.tar"]
)
def test_a_sidecar_lists_no_path_that_leaves_its_cache(tars, name):
    entry = next(iter(read_document(sidecar_path(tars, 2))["files"].values()))
    rewrite(sidecar_path(tars, 2), lambda body: body["files"].update({name: entry}))
    with pytest.raises(CacheFormatError, match="could leave the cache folder and is refused"):
        read_sidecar(tars, 2)


def rewrite(path, change):
    body = read_document(path)
    change(body)
    path.write_bytes(document_bytes(body))


def test_a_cache_is_converted_into_the_other_store_and_back(cache, tmp_path):
    store = read_plan(cache).store
    (other,) = {*STORES} - {store}
    convert(cache, tmp_path / "other", store=other)
    assert verify(tmp_path / "other", deep=True) == []
    assert_reads(tmp_path / "other", other)
    convert(tmp_path / "other", tmp_path / "back", store=store)
    assert tree(tmp_path / "back") == tree(cache)


def test_parts_are_merged_into_the_whole(cache, tmp_path):
    plan = read_plan(cache)
    for part in range(2):
        write_plan(tmp_path / f"{part}", plan)
        for index in range(part, plan.shard_count, 2):
            build_shard(tmp_path / f"{part}", plan, index)
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    found, whole = tree(tmp_path / "merged"), tree(cache)
    assert {name: data for name, data in found.items() if name not in (MANIFEST, SINKS)} == {
        name: data for name, data in whole.items() if name not in (MANIFEST, "processor/note.json")
    }
    assert_reads(tmp_path / "merged")


@pytest.mark.parametrize(
    ("shards", "signals", "first"),
    [((1, 2), None, "shards/00000.json"), ((0, 1, 2), ("logits",), "shards/00/00000.json")],
)
def test_a_part_lies_in_folders_or_not_as_its_own_size_says(cache, tmp_path, shards, signals, first):
    place = tmp_path / "part"
    pull_partial(cache, place, Selection(shards=shards, signals=signals))
    assert verify(place) == []
    assert (place / first).is_file()
    opened = open_cache(place)
    expected = [sample_id(p) for s in shards for p in plan_of().shard_range(s) if p != FAILED]
    assert list(opened.sample_ids) == expected
    names = {field.name for field in plan_of().all_fields if field in opened.plan.all_fields}
    for name in expected:
        record = make_record(int(name.rpartition(".")[2]))
        assert_equal_records(opened.read(name, names), {key: record[key] for key in names})


def test_a_cache_goes_to_a_folder_and_back_and_over_another(cache, tmp_path):
    place = tmp_path / "place"
    push(cache, place)
    assert tree(place) == tree(cache)
    pull(place, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(cache)
    (tmp_path / "back/shards/01/.tmp-00002.json-1-a").touch()
    sidecar_path(tmp_path / "back", 2).unlink()
    pull(place, tmp_path / "back")  # mends it
    assert tree(tmp_path / "back") == tree(cache)
    few = tmp_path / "few"
    build_cache(few, make_plan("webdataset", samples=4, shard_size=2))
    for one in (few, cache):  # a cache of few shards in the place of one of many, and the other way round
        push(one, place, overwrite=True)
        assert tree(place) == tree(one)


def test_a_cache_elsewhere_is_read_through_a_mirror_that_shards_leave(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror_module, "open_remote", lambda _: DirectoryRemote(cache))
    assert_read_in_little_room("https://host/cache", tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_cache_goes_to_s3_and_is_read_there(cache, s3, tmp_path, monkeypatch):
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    url = f"s3://caches/{tmp_path.name}"
    push(cache, url)
    assert_read_in_little_room(url, tmp_path, monkeypatch)
    pull(url, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(cache)


def assert_read_in_little_room(url, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "near"))
    monkeypatch.setenv("VLM_DISTILL_CACHE_BYTES", "1")  # each shard leaves as soon as it is closed
    mirror_module.forget_mirrors()
    opened = open_cache(url, open_shards=1)
    for position in set(range(SAMPLES)) - {FAILED}:
        assert_equal_records(opened.read(sample_id(position)), make_record(position))
    (held,) = (tmp_path / "near").glob("*/cache")
    assert planned_shards(held) == 3
    assert not files_of_shard(held, shard_stem(0, 3))  # it made room
    assert files_of_shard(held, shard_stem(2, 3))


def test_a_cache_without_its_plan_is_still_known_as_one(cache):
    for name in (PLAN, MANIFEST, "index.bin"):
        (cache / name).unlink()
    with pytest.raises(CacheFormatError, match=r"part of a cache, whose plan\.json is lost"):
        open_cache(cache)


def test_places_follow_a_plan_that_takes_anothers_place(folders, tmp_path):
    assert planned_shards(tmp_path) == 0
    for samples in (4, 6, 4):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        build_cache(tmp_path / "c", make_plan("webdataset", samples=samples, shard_size=2, signals={}, fields={}))
        assert planned_shards(tmp_path / "c") == samples // 2
        assert (tmp_path / "c" / "shards/00000.json").exists() == (samples == 4)


@pytest.mark.slow
def test_5001_shards_lie_in_six_folders(tmp_path):
    cache = describe_cache(tmp_path / "cache", 5_001, 1)
    assert sorted(path.name for path in (cache / "shards").iterdir()) == [f"{i:02d}" for i in range(6)]
    assert missing_shards(cache, read_plan(cache)) == []
    assert open_cache(cache).shard_of("sample/00005000") == 5_000
    sidecar_path(cache, 5_000).unlink()
    assert missing_shards(cache, read_plan(cache)) == [5_000]

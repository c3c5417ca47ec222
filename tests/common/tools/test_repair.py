"""Repair drops what is damaged and nothing else; what is built again is byte for byte what was there."""

import errno
import io
import os
import random
import shutil
from pathlib import Path

import pytest
from cache_factory import build_cache as build_whole
from cache_factory import build_shard, make_plan, tree
from click.testing import CliRunner

from vlm_distill_cache.common.cache.documents import document_bytes, read_document
from vlm_distill_cache.common.cache.index import INDEX
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.side_files import CARD, MANIFEST
from vlm_distill_cache.common.cache.sidecar import FileEntry, missing_shards, sidecar_path
from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.tools.repair import repair
from vlm_distill_cache.common.tools.verify import verify

FIDELITY: dict[str, object] = {"kl": 0.25}
SIDE_FILE = "processor/note.json"


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def original(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / request.param
    build_whole(folder, make_plan(request.param, samples=9, shard_size=3), fidelity=FIDELITY)
    return folder


@pytest.fixture
def cache(original, tmp_path):
    shutil.copytree(original, tmp_path / "cache")
    return tmp_path / "cache"


def build_again(cache):
    """What `teacher-cache build` does with a cache that lacks shards: the files beside them, the shards, the seal."""
    plan = read_plan(cache)
    if not missing_shards(cache, plan) and not verify(cache):
        return
    (cache / SIDE_FILE).write_text("{}\n")
    for shard in missing_shards(cache, plan):
        build_shard(cache, plan, shard)
    seal(cache, fidelity=FIDELITY, rewritten=True)


def inodes(cache):
    return {p: p.stat().st_ino for p in sorted(cache.rglob("*")) if p.is_file()}


def damage(path, rng):
    data = bytearray(path.read_bytes())
    kind = rng.randrange(3)
    if kind == 0:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == 1:
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        path.unlink()


def test_a_sound_cache_is_left_alone(cache):
    before = inodes(cache)
    assert repair(cache) == repair(cache, deep=True) == []
    assert inodes(cache) == before


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow(quick=1)
def test_damaged_at_random_repaired_and_built_again_the_bytes_are_the_originals(original, cache, seed):
    rng = random.Random(seed)
    names = [name for name in tree(cache) if name not in (CARD, "plan.json")]
    for name in rng.sample(names, rng.randrange(1, 6)):
        damage(cache / name, rng)
    found = {d.shard for d in verify(cache) if d.kind in ("shard", "missing")}
    healthy = {p: i for p, i in inodes(cache).items() if p.parent.name != "cache" and "processor" not in str(p)
               and not any(f"shards/{s:05d}." in str(p) for s in found)}  # fmt: skip
    repair(cache)
    assert repair(cache) == []  # only what is missing is left
    assert set(missing_shards(cache, read_plan(cache))) == found
    now = inodes(cache)
    assert {p: now[p] for p in healthy} == healthy
    build_again(cache)
    assert tree(cache) == tree(original)


def test_a_dry_run_changes_nothing_and_says_the_same(cache):
    damage(sidecar_path(cache, 1), random.Random(1))
    (cache / SIDE_FILE).write_text("?")
    before = tree(cache)
    said = repair(cache, dry_run=True)
    assert tree(cache) == before
    assert said == repair(cache)
    assert [(s.action, s.path) for s in said] == [
        ("remove", "shards/00001.json"), ("remove", SIDE_FILE), ("remove", MANIFEST),
    ]  # fmt: skip


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.slow(quick=("webdataset",))
def test_killed_at_any_step_it_can_be_called_again(store, tmp_path, monkeypatch):
    import vlm_distill_cache.common.files.atomic

    original = tmp_path / "original"
    plan = make_plan(store, samples=6, shard_size=2, signals={}, fields={})  # base fields: fewer files
    build_whole(original, plan, fidelity=FIDELITY)

    class KilledError(BaseException):
        pass

    real, place, killed = vlm_distill_cache.common.files.atomic.remove, 1, True
    while killed:
        cache, calls = tmp_path / str(place), 0
        shutil.copytree(original, cache)
        for name in (sidecar_path(cache, 0), sidecar_path(cache, 2), cache / SIDE_FILE):
            name.write_bytes(b"{}")
        (cache / "shards" / ".tmp-00001.tar-1-ab").write_bytes(b"half")

        def dying(path, stop=place):
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KilledError
            real(path)

        monkeypatch.setattr("vlm_distill_cache.common.tools.repair.remove", dying)
        try:
            repair(cache)
            killed = False
        except KilledError:
            monkeypatch.setattr("vlm_distill_cache.common.tools.repair.remove", real)
            assert not any(d.kind == "stranger" for d in verify(cache))
            repair(cache)
        build_again(cache)
        assert tree(cache) == tree(original)
        shutil.rmtree(cache)
        place += 1
    assert place > 6


def test_deep_repair_drops_a_shard_with_wrong_values(cache):
    plan = read_plan(cache)
    path = sidecar_path(cache, 0)
    body = read_document(path)
    body["rows"] += 1  # checksums made anew: only the content tells
    path.write_bytes(document_bytes(body))
    seal(cache)
    assert repair(cache) == []
    assert [s.path for s in repair(cache, deep=True)] == ["shards/00000.json", MANIFEST]
    assert missing_shards(cache, plan) == [0]


def test_a_damaged_index_is_written_anew_and_the_manifest_stays(original, cache):
    (cache / "index.bin").write_bytes(b"?")
    [step] = repair(cache)
    assert (step.action, step.path) == ("rewrite", "index.bin")
    assert tree(cache) == tree(original)


def test_strangers_files_and_links_are_named_and_stay(cache, tmp_path):
    (cache / "notes.txt").write_text("mine")
    (cache / "shards" / "00099.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "note.json").write_text("not yours")
    shutil.rmtree(cache / "processor")
    (cache / "processor").symlink_to(tmp_path / "elsewhere")
    kept = {s.path for s in repair(cache) if s.action == "keep"}
    assert kept == {"notes.txt", "shards/00099.json", "processor", SIDE_FILE}
    assert (cache / "notes.txt").read_text() == "mine"
    assert (tmp_path / "elsewhere" / "note.json").read_text() == "not yours"


def test_a_link_in_a_shards_place_goes_and_its_target_stays(original, cache, tmp_path):
    shard = next(p for p in (cache / "shards").iterdir() if p.name in ("00001.zarr", "00001.tar"))
    shard.rename(tmp_path / "moved")
    shard.symlink_to(tmp_path / "moved")
    before = tree(tmp_path / "moved") or (tmp_path / "moved").read_bytes()
    assert [s.path for s in repair(cache)] == ["shards/00001.json", MANIFEST]
    assert (tree(tmp_path / "moved") or (tmp_path / "moved").read_bytes()) == before
    build_again(cache)
    assert tree(cache) == tree(original)


def test_without_its_plan_nothing_is_removed(cache, tmp_path):
    before = tree(cache)
    damaged = before["plan.json"][:-9]
    (cache / "plan.json").write_bytes(damaged)
    [step] = repair(cache)
    assert (step.action, step.path) == ("keep", "plan.json")
    assert "copy it again" in str(step)
    build_whole(tmp_path / "other", make_plan(samples=20))
    shutil.copy(tmp_path / "other" / "plan.json", cache / "plan.json")  # sound, but another cache's
    [step] = repair(cache)
    assert "was made for plan" in str(step)
    assert tree(cache) == before | {"plan.json": (tmp_path / "other" / "plan.json").read_bytes()}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("part", ["plan.json", MANIFEST, INDEX, "note.json", "processor", "00001.json", "00001"])
@pytest.mark.slow(quick=3)
def test_what_cannot_be_read_stays_and_is_named(cache, part, number, monkeypatch):
    part = next(path.name for path in (cache / "shards").glob("00001.[tz]*")) if part == "00001" else part
    sidecar_path(cache, 2).write_bytes(b"{}")  # this one is damaged, whatever happens to others
    before = tree(cache)

    def refusing(real):  # root may read everything
        def opened(path, *args, **options):
            if not isinstance(path, int) and part in Path(path).parts:
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *args, **options)

        return opened

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing(os.open))
        patch.setattr(io, "open", refusing(io.open))
        steps = [*repair(cache, dry_run=True)]
        assert repair(cache) == steps
    kept = {step.path: step for step in steps if step.action == "keep"}
    named = [name for name in kept if part in Path(name).parts]
    assert named
    for name in named:
        assert os.strerror(number) in str(kept[name])
        assert "build it again" not in str(kept[name])
        assert "make it readable first" in str(kept[name])
    gone = before.keys() - tree(cache).keys()
    assert not any(part in Path(name).parts or "/00001." in name for name in gone)
    assert ("shards/00002.json" in gone) == (part != "plan.json")


@pytest.mark.parametrize("fault", ["no sidecar", "sidecar", "manifest", "leftover", "leftover folder"])
def test_what_nobody_lists_is_not_removed_unread(cache, fault, monkeypatch):
    closed = next(path for path in sorted((cache / "shards").rglob("*")) if "00001.json" not in str(path) and
                  path.is_file() and "00001." in str(path))  # fmt: skip
    if fault == "no sidecar":
        sidecar_path(cache, 1).unlink()
    elif fault == "sidecar":
        sidecar_path(cache, 1).write_bytes(b"{}")
    elif fault == "manifest":
        (cache / MANIFEST).write_bytes(b"{}")
        closed = cache / SIDE_FILE
    else:
        closed = cache / "shards" / ".tmp-x" / "inner" / "part" if "folder" in fault else cache / ".tmp-x"
        closed.parent.mkdir(parents=True, exist_ok=True)
        closed.write_bytes(b"half")
    before = tree(cache)

    def opened(path, *args, **options):  # root may read everything
        if not isinstance(path, int) and Path(path).name == closed.name and closed.samefile(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **options)

    real = io.open
    with monkeypatch.context() as patch:
        patch.setattr(io, "open", opened)
        steps = repair(cache)
    assert before.keys() - tree(cache).keys() <= {MANIFEST}
    kept = next(step for step in steps if closed.is_relative_to(cache / step.path))
    assert (kept.action, "make it readable first" in str(kept)) == ("keep", True)
    assert [step for step in repair(cache) if step.action != "keep"] or fault == "manifest"  # readable: as ever


def test_a_shard_that_is_being_written_is_left_to_its_writer(cache):
    from vlm_distill_cache.common.cache.stores import open_writer

    plan = read_plan(cache)
    sidecar_path(cache, 1).unlink()
    shutil.rmtree(cache / "shards" / "00001.zarr", ignore_errors=True)
    (cache / "shards" / "00001.tar").unlink(missing_ok=True)
    writer = open_writer(plan.store, cache, 1, plan.all_fields)
    published = writer.close()  # the sidecar comes next
    assert [s.path for s in repair(cache)] == [MANIFEST]
    assert (cache / published[0]).exists()
    writer.abort()  # as its death would
    [step] = repair(cache)
    assert step.path.startswith("shards/00001.")
    assert not (cache / published[0]).exists()


def test_the_command_says_what_it_did_and_what_is_next(cache):
    def run(*arguments, code=0):
        result = CliRunner().invoke(main, ["repair", str(cache), *arguments])
        assert result.exit_code == code, result.output
        return result.output

    assert f"ok: {cache}: nothing to repair" in run()
    sidecar_path(cache, 2).write_text("{}")
    output = run("--dry-run")
    assert "would remove: shards/00002.json: " in output
    assert f"Next: cachectl repair {cache}" in output
    output = run()
    assert "remove: manifest.json: lists missing files" in output
    assert "teacher-cache build with the same options makes the missing shards (1)" in output
    assert f"ok: {cache}: nothing to repair; 1 of 3 shards are to be built" in run()
    (cache / "shards" / "bad\x1b]0;name").write_text("")
    assert "Next:" not in run("--dry-run", code=1)  # a repair would change nothing
    output = run(code=1)
    assert r"keep: shards/bad\x1b]0;name: belongs to no shard and no list; delete it" in output


def test_a_file_entry_of_the_index_that_lies_takes_the_manifest_with_it(cache):
    body = read_document(cache / MANIFEST)
    body["files"]["index.bin"] = FileEntry.of_bytes(b"?").to_dict()
    (cache / MANIFEST).write_bytes(document_bytes(body))
    (cache / "index.bin").write_bytes(b"?")
    repair(cache)
    assert not (cache / MANIFEST).exists()
    seal(cache)
    assert verify(cache) == []


def of_a_newer_version(path, *, signed=True):
    """A description as a later version writes it; or, not signed, as a flipped bit makes it look."""
    body = read_document(path)
    newer = body | {"format_version": 3}
    stated = (
        document_bytes(newer)
        if signed
        else document_bytes(body).replace(b'"format_version": 1', b'"format_version": 3')
    )
    path.write_bytes(stated)


@pytest.mark.parametrize("name", ["shards/00001.json", MANIFEST, "plan.json"])
def test_what_a_newer_version_wrote_is_not_damaged_and_nothing_of_its_cache_is_removed(cache, name):
    sidecar_path(cache, 0).write_bytes(b"{}")  # even so: nobody can tell what the newer version would say of it
    of_a_newer_version(cache / name)
    before = tree(cache)
    result = CliRunner().invoke(main, ["verify", str(cache)])
    assert result.exit_code == 1
    assert f"{name}: from a newer version: format version 3" in result.output.replace(f"{cache}/", "")
    assert "update this software" in result.output
    assert "damaged" not in result.output
    assert "cachectl repair" not in result.output
    result = CliRunner().invoke(main, ["repair", str(cache)])
    assert result.exit_code == 1
    assert f"keep: {name}: " in result.output
    assert "nothing of this cache is removed" in result.output
    assert "teacher-cache build" not in result.output
    assert tree(cache) == before


@pytest.mark.parametrize("name", ["shards/00001.json", MANIFEST])
def test_a_flipped_bit_in_the_version_is_damage_like_any_other(cache, name):
    of_a_newer_version(cache / name, signed=False)
    assert [(d.path, d.kind) for d in verify(cache)] == [(name, "manifest" if name == MANIFEST else "shard")]
    assert name in [s.path for s in repair(cache) if s.action == "remove"]


def test_a_codec_of_a_newer_version_costs_no_shard(cache):
    plan = read_plan(cache)
    plan.signals["logits"]["codec"] = "quantum"
    (cache / "plan.json").write_bytes(document_bytes(plan.to_dict()))
    (cache / MANIFEST).unlink()
    seal(cache)
    before = tree(cache)
    [step] = repair(cache, deep=True)
    assert (step.action, step.path) == ("keep", "plan.json")
    assert tree(cache) == before

"""A push leaves a whole cache or none that anybody would take for one, whatever happens to it or beside it."""

import errno
import shutil
from pathlib import Path

import pytest
from cache_factory import build_cache, make_plan, make_record, sample_id, tree

import vlm_distill_cache.common.remotes.directory
import vlm_distill_cache.common.remotes.push
import vlm_distill_cache.common.tools.previews
from vlm_distill_cache.common.cache.manifest import read_manifest, seal
from vlm_distill_cache.common.cache.plan import PLAN
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, TransferError
from vlm_distill_cache.common.remotes.directory import DirectoryRemote
from vlm_distill_cache.common.remotes.pull import pull
from vlm_distill_cache.common.remotes.push import many_files, push
from vlm_distill_cache.common.tools.previews import preview_push


def make_cache(folder: Path, **changes: object) -> Path:
    build_cache(folder, make_plan("webdataset", **changes), fidelity={"kl": 0.25})
    (folder / "README.md").write_text("# A card\n")
    return folder


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")


@pytest.fixture
def place(tmp_path):
    return tmp_path / "place"


class Recorder(DirectoryRemote):
    """A folder that remembers what was written in which order, and may be told to act or fail before."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written: list[str] = []
        self.before = lambda name: None

    def create(self, name, data):
        self.before(name)
        self.written.append(name)
        return super().create(name, data)

    def upload(self, files, *, on_bytes=None):
        for name, source in files.items():
            self.before(name)
            super().upload({name: source}, on_bytes=on_bytes)
            self.written.append(name)


@pytest.fixture
def recorder(place, monkeypatch):
    remote = Recorder(place)
    monkeypatch.setattr(vlm_distill_cache.common.remotes.push, "open_remote", lambda _: remote)
    return remote


def test_whoever_looks_during_a_push_finds_no_cache_or_all_of_it(cache, recorder):
    push(cache, recorder.root)
    names = recorder.written
    assert names[0] == PLAN
    assert names[-1] == MANIFEST
    assert sorted(names) == sorted(tree(cache))
    for shard in range(3):
        assert names.index(f"shards/{shard:05d}.tar") < names.index(f"shards/{shard:05d}.json")


@pytest.mark.parametrize("dies_at", range(1, 11))
def test_a_push_that_dies_anywhere_leaves_no_manifest_and_the_next_completes_it(cache, recorder, tmp_path, dies_at):
    def die(name: str) -> None:
        if len(recorder.written) == dies_at:
            raise ConnectionResetError(name)

    recorder.before = die
    with pytest.raises(ConnectionResetError):
        push(cache, recorder.root, jobs=1)
    with pytest.raises(
        CacheFormatError, match=r"not complete: there is plan\.json but no manifest\.json; run `cachectl push"
    ):
        pull(recorder.root, tmp_path / "back")
    done = {name for name in recorder.written if name.startswith("shards/") and name.endswith("json")}
    recorder.before, recorder.written = lambda name: None, []
    push(cache, recorder.root, jobs=1)
    assert tree(recorder.root) == tree(cache)
    assert not done & set(recorder.written)  # a shard that was there is not sent again


def test_a_place_that_advises_few_files_is_pushed_to_with_a_warning(cache, recorder, place, monkeypatch, caplog):
    files = len(tree(cache)) - 1  # but for the card
    monkeypatch.setattr(type(recorder), "advised_files", files - 1)
    monkeypatch.setattr(vlm_distill_cache.common.tools.previews, "open_remote", lambda _: recorder)
    said = f"{place}: the cache has {files} files, and no more than {files - 1} are advised there"
    assert said in "\n".join(preview_push(cache, str(place), jobs=1, overwrite=False).lines)
    push(cache, place)
    assert [said in message for message in caplog.messages] == [True]
    assert "cachectl convert" not in caplog.text  # its shards are tars already
    assert "cachectl convert" in many_files(recorder, read_manifest(cache), [3, 2, 3, 2])  # some are not
    caplog.clear()
    monkeypatch.setattr(type(recorder), "advised_files", files)
    push(cache, place, overwrite=True)
    assert not caplog.messages
    assert tree(place) == tree(cache)


def test_a_damaged_or_unfinished_cache_is_not_pushed(cache, place):
    tar = cache / "shards" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"\1")
    with pytest.raises(CacheFormatError, match=r"00001\.tar: lost or damaged, so the cache is not pushed.*verify"):
        push(cache, place)
    assert not (place / MANIFEST).exists()
    assert not (place / "shards" / "00001.tar").exists()
    tar.unlink()
    with pytest.raises(CacheFormatError, match=r"00001\.tar: lost or damaged"):
        push(cache, place)
    (cache / MANIFEST).unlink()
    with pytest.raises(CacheFormatError, match="not sealed"):
        push(cache, place)


def test_descriptions_that_are_damaged_or_do_not_fit_are_not_pushed(cache, place, tmp_path):
    other = make_cache(tmp_path / "other", fingerprints={"teacher": "c" * 32})
    note, sidecar, plan = cache / "processor" / "note.json", cache / "shards" / "00002.json", cache / PLAN
    for path, data, words in (
        (note, b"[]\n", "note.json: lost or damaged"),
        (sidecar, sidecar.read_bytes() + b" ", "00002.json: lost or damaged"),
        (plan, (other / PLAN).read_bytes(), "manifest.json belongs to another plan.json"),
    ):
        before = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(CacheFormatError, match=words):
            push(cache, place)
        path.write_bytes(before)
        assert not (place / MANIFEST).exists()
    push(cache, place)
    assert tree(place) == tree(cache)


@pytest.mark.parametrize("damage", ["plan.json", "shards/00001.json", "manifest.json", None])
def test_an_unfinished_push_of_another_cache_and_a_damaged_one_are_replaced_when_told_to(
    cache, recorder, tmp_path, damage
):
    def die(name: str) -> None:
        if name == MANIFEST:
            raise ConnectionResetError

    other = make_cache(tmp_path / "other", fingerprints={"teacher": "c" * 32}, shard_size=2)
    if damage != MANIFEST:
        recorder.before = die
        with pytest.raises(ConnectionResetError):
            push(other, recorder.root)
        recorder.before = lambda name: None
    else:
        push(other, recorder.root)
    if damage is not None:
        (recorder.root / damage).write_text("damaged")
    with pytest.raises(CacheMismatchError, match=r"holds another cache|is receiving another cache"):
        push(cache, recorder.root)
    push(cache, recorder.root, overwrite=True)
    pull(recorder.root, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(cache)
    if damage is None:  # of damaged descriptions nobody can say which files were theirs
        assert tree(recorder.root) == tree(cache)


def other_bits(tmp_path: Path) -> Path:
    """A cache with the same plan and other records, as another device makes it."""
    other = tmp_path / "other-bits"
    build_cache(other, make_plan("webdataset"))
    (other / "shards" / "00002.json").unlink()
    (other / "shards" / "00002.tar").unlink()
    plan = make_plan("webdataset")
    writer = open_writer("webdataset", other, 2, plan.all_fields)
    for position in plan.shard_range(2):
        writer.append(sample_id(position), make_record(position + 100))
    finish_shard(writer, [])
    seal(other)
    return other


def test_two_caches_of_one_plan_are_not_mixed(cache, recorder, tmp_path):
    def die(name: str) -> None:
        if name == MANIFEST:
            raise ConnectionResetError

    recorder.before = die
    with pytest.raises(ConnectionResetError):
        push(cache, recorder.root)
    recorder.before, other = lambda name: None, other_bits(tmp_path)
    with pytest.raises(CacheMismatchError, match=r"another cache with the same plan \(its shards/00002.json differs"):
        push(other, recorder.root)
    push(other, recorder.root, overwrite=True)
    pull(recorder.root, tmp_path / "back")
    assert {n: d for n, d in tree(tmp_path / "back").items() if n != "README.md"} == tree(other)


def test_a_push_that_was_overtaken_by_another_does_not_call_it_complete(cache, recorder, tmp_path):
    other = make_cache(tmp_path / "other", fingerprints={"teacher": "c" * 32})

    def interfere(name: str) -> None:
        if name == "shards/00002.json" and not (recorder.root / "theirs").exists():
            (recorder.root / "theirs").touch()
            shutil.copy(other / PLAN, recorder.root / PLAN)

    recorder.before = interfere
    with pytest.raises(CacheMismatchError, match=r"changed by another push meanwhile \(plan.json\)"):
        push(cache, recorder.root)
    assert not (recorder.root / MANIFEST).exists()
    with pytest.raises(CacheMismatchError, match="is receiving another cache"):
        push(cache, recorder.root)


def test_overwriting_mends_a_cache_that_lost_files(cache, place):
    push(cache, place)
    (place / "shards" / "00001.tar").unlink()
    with pytest.raises(TransferError, match=r"00001\.tar: missing, although .*push CACHE .*place --overwrite"):
        pull(place, place.with_name("back"))
    push(cache, place, overwrite=True)
    assert tree(place) == tree(cache)


def test_what_a_killed_push_left_in_a_folder_goes_with_the_next(cache, place):
    (place / "shards").mkdir(parents=True)
    (place / "shards" / ".tmp-00001.tar-123-abcd").write_bytes(b"half")
    push(cache, place)
    assert tree(place) == tree(cache)


def test_a_disk_that_fills_up_there_is_said(cache, place, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(vlm_distill_cache.common.remotes.directory, "publish_file", full)
    with pytest.raises(TransferError, match=r"00000\.tar: No space left on device; make room, then run"):
        push(cache, place, jobs=1)
    assert not (place / MANIFEST).exists()
    assert not list(place.rglob(".tmp-*"))


def test_a_folder_of_other_things_is_not_written_into(cache, place):
    place.mkdir()
    (place / "thesis.txt").write_text("all of it")
    with pytest.raises(ConfigError, match="not empty and no cache"):
        push(cache, place)
    assert tree(place) == {"thesis.txt": b"all of it"}
    push(cache, place, overwrite=True)
    assert tree(place) == tree(cache) | {"thesis.txt": b"all of it"}


def test_an_address_with_a_readme_of_its_own_is_not_written_into(cache, recorder, place):
    place.mkdir()
    (place / "README.md").write_text("# My home page\n")
    with pytest.raises(CacheMismatchError, match=r"has a README.md, which the cache's card would replace"):
        push(cache, "s3://caches/home")
    assert tree(place) == {"README.md": b"# My home page\n"}


def test_a_second_push_is_refused_while_the_first_one_writes(cache, recorder, tmp_path):
    other = make_cache(tmp_path / "other", fingerprints={"data": "another"})

    def overwrite_once(name: str) -> None:
        if name == "shards/00001.tar":
            recorder.before = lambda name: None
            with pytest.raises(ConfigError, match="another process is writing there"):
                push(other, recorder.root, jobs=1, overwrite=True)

    recorder.before = overwrite_once
    push(cache, recorder.root, jobs=1)
    assert tree(recorder.root) == tree(cache)


def test_overwriting_leaves_no_empty_folders_of_the_old_shards(cache, place, tmp_path):
    build_cache(tmp_path / "zarr", make_plan("zarr"))
    push(tmp_path / "zarr", place)
    push(cache, place, overwrite=True)
    assert sorted(path.relative_to(place) for path in place.rglob("*")) == sorted(
        path.relative_to(cache) for path in cache.rglob("*")
    )


def test_a_new_fidelity_card_travels_alone(cache, recorder, tmp_path):
    push(cache, recorder.root)
    pull(recorder.root, tmp_path / "back")
    seal(cache, fidelity={"kl": 0.5})
    (cache / "README.md").write_text("# Measured again\n")
    recorder.written = []
    push(cache, recorder.root)
    assert recorder.written == ["README.md", MANIFEST]
    _, moved = pull(recorder.root, tmp_path / "back")
    assert moved.files == 2
    assert tree(tmp_path / "back") == tree(cache)

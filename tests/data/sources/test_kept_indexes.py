"""What is kept of large data says what a look at the data says, is made once, and is never believed where it does not fit."""

import contextlib
import io
import json
import multiprocessing
import pickle
import tarfile

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_distill_cache.common.cache.index import hash_ids
from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sources.kept import headers, store, surveys, tars
from vlm_distill_cache.data.sources.webdataset import WebDataset


def picture(value):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), (value % 256,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, form=tarfile.USTAR_FORMAT, mtime=0):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first, count, answer="a circle"):
    return [
        part
        for i in range(first, first + count)
        for part in (
            (f"k{i:04d}.json", json.dumps({"caption": f"{answer} {i}"}).encode()),
            (f"k{i:04d}.png", picture(i)),
        )
    ]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder of two archives, all of which is kept."""
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "near"))
    monkeypatch.setattr(tars, "KEPT_FROM", 0)
    folder = tmp_path / "data"
    folder.mkdir()
    write_tar(folder / "a.tar", samples(0, 5))
    write_tar(folder / "b.tar", samples(5, 3))
    return folder


def made(monkeypatch):
    """Names of the archives that are read from now on."""
    names = []
    read = headers.read_members
    monkeypatch.setattr(tars, "read_members", lambda path: names.append(path.name) or read(path))
    return names


def seen(dataset):
    """All that a data set says, pictures' bytes included."""
    return [
        (s.sample_id, s.turns[0].answer, [image.read() for image in s.images])
        for s in map(dataset.__getitem__, range(len(dataset)))
    ]


def test_kept_indexes_say_what_the_archives_say_and_are_made_once(kept, monkeypatch):
    names = made(monkeypatch)
    first = open_dataset(str(kept))
    assert sorted(names) == ["a.tar", "b.tar"]
    names.clear()
    again = open_dataset(str(kept))
    assert seen(again) == seen(first)
    assert list(again.sample_ids) == [f"k{i:04d}" for i in range(8)]
    assert seen(pickle.loads(pickle.dumps(again))) == seen(first)  # noqa: S301 - our own bytes
    assert not names
    monkeypatch.setattr(tars, "KEPT_FROM", 1 << 40)
    plain = open_dataset(str(kept))
    assert seen(plain) == seen(first)
    assert plain.survey() == first.survey() == again.survey()
    hashes = np.concatenate(list(again.sample_ids.hashes()))
    assert np.array_equal(hashes, np.stack(hash_ids(plain.sample_ids), axis=1))


def test_a_survey_is_made_once_and_in_parts_is_the_same(kept, monkeypatch):
    monkeypatch.setattr(surveys, "SHARED_FROM", 0)
    monkeypatch.setattr(surveys.os, "sched_getaffinity", lambda _: {0, 1})
    survey = open_dataset(str(kept)).survey()
    monkeypatch.setattr(surveys, "_survey_together", pytest.fail)
    assert open_dataset(str(kept)).survey() == survey
    monkeypatch.setattr(tars, "KEPT_FROM", 1 << 40)
    assert open_dataset(str(kept)).survey() == survey


def test_an_index_of_another_file_of_the_same_name_is_not_believed(kept, monkeypatch):
    before = open_dataset(str(kept)).survey()
    names = made(monkeypatch)
    write_tar(kept / "b.tar", samples(5, 3, answer="a square"), mtime=1)
    dataset = open_dataset(str(kept))
    assert names == ["b.tar"]
    assert dataset[5].turns[0].answer == "a square 5"
    assert dataset.survey() != before


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "folder", "other code"])
def test_damaged_indexes_are_made_anew(kept, monkeypatch, damage):
    expected = seen(open_dataset(str(kept)))
    for path in store.kept_folder().rglob("*.bin"):
        data = bytearray(path.read_bytes())
        if damage == "folder":
            path.unlink()
            path.mkdir()
        elif damage == "other code":
            monkeypatch.setattr(store, "code_version", lambda: "another")
        else:
            data[len(data) // 2] ^= 1
            path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
    names = made(monkeypatch)
    assert seen(open_dataset(str(kept))) == expected
    assert {"a.tar", "b.tar"} <= {*names}


def _open(folder, where):
    where.put(seen(open_dataset(str(folder))))


def test_two_processes_that_make_an_index_at_once_agree(kept):
    fork = multiprocessing.get_context("fork")
    where = fork.SimpleQueue()
    processes = [fork.Process(target=_open, args=(kept, where)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [where.get() for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1] == seen(open_dataset(str(kept)))


def test_where_nothing_can_be_written_data_are_read_all_the_same(kept, monkeypatch, caplog):
    expected = seen(open_dataset(str(kept)))
    blocked = kept.parent / "file"
    blocked.write_bytes(b"")
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(blocked))
    store._tell_unwritable.cache_clear()
    assert seen(open_dataset(str(kept))) == expected
    assert "cannot be written" in caplog.text


def test_several_processes_index_archives_together(kept, monkeypatch):
    monkeypatch.setattr(tars, "_SHARED_FROM", 0)
    monkeypatch.setattr(tars.os, "sched_getaffinity", lambda _: {0, 1})
    names = made(monkeypatch)
    assert len(open_dataset(str(kept))) == 8
    assert not names  # here: others did
    write_tar(kept / "b.tar", samples(5, 3)).write_bytes(b"no archive at all")
    with pytest.raises(DataError, match=r"b\.tar cannot be read as an uncompressed tar"):
        open_dataset(str(kept))


def test_repeated_keys_are_refused_from_kept_indexes_too(kept):
    write_tar(kept / "c.tar", samples(7, 1))
    for _ in range(2):
        with pytest.raises(DataError, match="1 ids occur more than once: 'k0007'"):
            open_dataset(str(kept))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["k", "part/k", "l" * 120, "\u00e9", "folder/" + "m" * 94])
@pytest.mark.parametrize("mtime", [0, 1.5])
def test_members_are_those_that_tarfile_finds(tmp_path, form, name, mtime):
    if form == tarfile.USTAR_FORMAT:
        name = name[:94]  # it has no room for more
    path = write_tar(
        tmp_path / "a.tar", [(f"{name}.json", b"{}"), (f"{name}.png", b"x" * 600), ("empty.txt", b"")], form, mtime
    )
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(m.name, m.offset, m.size) for m in headers.read_members(path)] == expected


def test_usual_archives_need_no_tarfile(tmp_path, monkeypatch):
    expected = {}
    for mtime in (0, 1.5):
        path = write_tar(tmp_path / f"{mtime}.tar", samples(0, 9), tarfile.PAX_FORMAT, mtime)
        with tarfile.open(path) as tar:
            expected[path] = headers._members_of(path.name, list(tar))
    monkeypatch.setattr(headers, "_read_file", pytest.fail)
    assert all(headers.read_members(path) == members for path, members in expected.items())


@pytest.mark.parametrize("at", [0, 3, 100, 124, 148, 156, 257, 512, 700, 1024])
def test_damage_is_never_passed_over(tmp_path, at):
    path = write_tar(tmp_path / "a.tar", samples(0, 2))
    data = bytearray(path.read_bytes())
    data[at] ^= 0x15
    path.write_bytes(data)
    try:
        with tarfile.open(path) as tar:
            expected = [(info.name, info.offset_data) for info in tar if not info.isdir()]
    except tarfile.TarError:
        expected = None
    with contextlib.suppress(DataError):  # as `tarfile` does, or because what it takes for the end is none
        assert [(m.name, m.offset) for m in headers.read_members(path)] == expected


def test_a_cut_archive_is_refused_with_the_byte(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(0, 2))
    for size in (600, 1024, 2048):
        path.write_bytes(
            path.read_bytes()[:size]
            if path.stat().st_size >= size
            else write_tar(path, samples(0, 2)).read_bytes()[:size]
        )
        with pytest.raises(DataError, match=r"a\.tar (is cut off or damaged at byte|cannot be read)"):
            WebDataset(str(path))


def test_data_told_by_files_have_another_fingerprint_and_the_same_samples(kept):
    plain, by_files = open_dataset(str(kept)), open_dataset(f"{kept}/*.tar:streaming=true")
    assert seen(plain) == seen(by_files)
    assert by_files.survey().fingerprint != plain.survey().fingerprint
    assert by_files.survey().most_pictures == 1
    write_tar(kept / "b.tar", samples(5, 4))
    assert open_dataset(f"{kept}/*.tar:streaming=true").survey().fingerprint != by_files.survey().fingerprint


def test_no_text_is_read_for_the_survey_of_data_told_by_files(kept, monkeypatch):
    dataset = open_dataset(f"{kept}/*.tar:streaming=true")
    monkeypatch.setattr(WebDataset, "read", pytest.fail)
    assert dataset.survey().fullest in {*dataset.sample_ids}


def test_a_sample_beyond_the_end_of_its_archive_is_its_own_error(kept):
    dataset = open_dataset(str(kept))
    data = (kept / "b.tar").read_bytes()
    with (kept / "b.tar").open("r+b") as file:
        file.truncate(len(data) // 4)
    with pytest.raises(SampleError, match="cut off"):
        seen(dataset)


PARTS = [
    "a",
    "0",
    "é",
    ".",
    "..",
    "/",
    "__x__",
    "__",
    "__MACOSX/",
    "._",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "json",
    "\n",
]


@given(st.lists(st.sampled_from(PARTS), max_size=6).map("".join))
def test_a_member_that_is_not_looked_at_closer_has_the_key_that_the_rules_give(name):
    """Or is no plain one: then the rules themselves decide."""
    key, extension = tars._plain_key(name)
    if key:
        assert not tars._HIDDEN.fullmatch(name)
        assert not tars._METADATA.fullmatch(name)
        assert tars._KEY.fullmatch(name).groups() == (key, extension)

"""Ids of large JSON, CSV and parquet files: what a look at the file says, found once, never believed of another file."""

import csv
import json
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest

from vlm_distill_cache.common.cache.index import hash_ids
from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sources import csv_rows, llava, messages, parquet, table
from vlm_distill_cache.data.sources.kept import files, surveys

READERS = {".jsonl": messages, ".json": llava, ".csv": csv_rows, ".parquet": table}

COUNT = 60
IDS = [None if i % 7 == 6 else f"né-{i % 40}" if i % 2 else i % 40 for i in range(COUNT)]  # some missing, some repeated


def write(path, answer="a circle"):
    """Write the same entries into a file of the kind that its name says."""
    entries = [{"id": given, "question": "what?", "answer": f"{answer} {i}"} for i, given in enumerate(IDS)]
    if path.suffix == ".jsonl":
        lines = [json.dumps(entry) for entry in entries]
        lines[3], lines[5] = '{"id": ', ""
        path.write_text("\n".join(lines))
    elif path.suffix == ".json":
        entries[3] = ["no", "entry"]
        path.write_text(json.dumps(entries, indent=1, ensure_ascii=False))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, entries[0])
            writer.writeheader()
            writer.writerows(entries)
    else:
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(
            pa.Table.from_pylist([{**e, "id": None if e["id"] is None else str(e["id"])} for e in entries]), path
        )
    return path


def seen(data):
    """All that a data set says."""
    found = []
    for index, sample_id in enumerate(data.sample_ids):
        try:
            found.append((sample_id, data[index].turns))
        except SampleError as error:
            found.append((sample_id, str(error)))
    return found


def copied(data):
    """As another process gets it."""
    return pickle.loads(pickle.dumps(data))  # noqa: S301 - made here


@pytest.fixture(params=["a.jsonl", "a.json", "a.csv", "a.parquet"])
def path(request, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "near"))
    return write(tmp_path / request.param)


@pytest.fixture
def looks(monkeypatch):
    """From now on files of any size are kept; how often one is looked at."""
    found = []
    for module in READERS.values():
        monkeypatch.setattr(
            module, "resolve_ids", lambda *a, inner=module.resolve_ids, **k: found.append(1) or inner(*a, **k)
        )
    monkeypatch.setattr(files, "KEPT_FROM", 0)
    monkeypatch.setattr(parquet, "SHARED_FROM", 0)
    return found


def test_what_is_kept_says_what_a_look_at_the_file_says_and_no_later_process_looks(path, looks, monkeypatch, tmp_path):
    with monkeypatch.context() as small:
        small.setattr(files, "KEPT_FROM", 1 << 30)
        small.setattr(parquet, "SHARED_FROM", 1 << 30)
        plain = open_dataset(str(path))
        expected, survey = seen(plain), plain.survey()
        assert not (tmp_path / "near").exists()
    assert expected == seen(copied(plain))
    looks.clear()
    for _ in range(3):
        data = open_dataset(str(path))
        assert (seen(data), data.survey()) == (expected, survey)
        monkeypatch.setattr(surveys, "survey_samples", pytest.fail)  # it is made once
    assert len(looks) == 1
    assert seen(copied(data)) == expected
    assert len(looks) == 1
    ids = [sample_id for sample_id, _ in expected]
    assert data.sample_ids == ids
    assert data.sample_ids[3:5] == ids[3:5]
    assert (np.concatenate([*data.sample_ids.hashes()]) == np.stack(hash_ids(ids), axis=1)).all()
    shutil.rmtree(tmp_path / "near")  # which may be deleted at any time
    assert seen(copied(data)) == expected


def test_a_file_that_has_changed_and_a_damaged_kept_one_are_looked_at_again(path, looks, tmp_path):
    first = open_dataset(str(path))
    before, survey = seen(first), first.survey()
    write(path, "a square")
    os.utime(path, ns=(1, 1))
    changed = open_dataset(str(path))
    assert len(looks) == 2
    assert [name for name, _ in before][:3] == [name for name, _ in seen(changed)][:3]
    expected = seen(changed)
    assert expected != before
    assert changed.survey() != survey
    for file in (tmp_path / "near" / "data" / "entries").iterdir():
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.unlink()  # whoever has it mapped keeps it
        file.write_bytes(data)
    assert seen(open_dataset(str(path))) == expected
    assert len(looks) == 3


def test_what_changes_while_it_is_looked_at_is_not_kept(path, looks, monkeypatch, tmp_path):
    module = READERS[path.suffix]
    resolve = module.resolve_ids

    def and_touch(*arguments, **options):
        os.utime(path, ns=(5, len(looks)))
        return resolve(*arguments, **options)

    monkeypatch.setattr(module, "resolve_ids", and_touch)
    open_dataset(str(path))
    assert not [*(tmp_path / "near").rglob("entries/*")]


def test_another_process_never_takes_a_changed_file_for_the_one_that_was_opened(path, looks, tmp_path):
    data = pickle.dumps(open_dataset(str(path)))
    expected, stamp = seen(open_dataset(str(path))), path.stat()
    shutil.rmtree(tmp_path / "near")
    before = path.read_bytes()
    write(path, "an unlike shape")
    os.utime(path, ns=(7, 7))
    pickle.loads(data)  # noqa: S301 - made here
    path.write_bytes(before)
    os.utime(path, ns=(stamp.st_mtime_ns, stamp.st_mtime_ns))
    assert seen(open_dataset(str(path))) == expected


def _open(path, where):
    where.put(seen(open_dataset(str(path))))


@pytest.mark.parametrize("path", ["a.jsonl", "a.json", "a.csv"], indirect=True)
def test_two_processes_that_look_at_a_file_at_once_agree(path, looks):
    fork = multiprocessing.get_context("fork")
    where = fork.SimpleQueue()
    processes = [fork.Process(target=_open, args=(path, where)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [where.get() for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1] == seen(open_dataset(str(path)))


@pytest.mark.parametrize("path", ["a.jsonl", "a.json"], indirect=True)
def test_an_entry_of_a_file_that_changes_under_a_process_is_refused(path, looks):
    data = open_dataset(str(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"has changed: sample"):
        seen(data)


def test_of_a_list_in_one_line_only_its_beginning_is_looked_at_to_tell_it_from_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(" \n" * 2000 + json.dumps([{"question": "what?", "answer": "x" * 100_000}]))
    monkeypatch.setattr(messages, "parse_line", pytest.fail)
    assert not messages.holds_lines(path)
    path.write_text(" \n" * 2000 + json.dumps({"question": "what?", "answer": "x"}) + "\n{}")
    monkeypatch.undo()
    assert messages.holds_lines(path)

"""Notes are read of plain files of a bounded size, and of nothing else that stands in their place."""

import os

import pytest

from vlm_distill_cache.common.files import notes

STRANGE = {
    "pipe": lambda path: os.mkfifo(path),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "large": lambda path: path.write_bytes(b"x" * (notes.MAX_BYTES + 1)),
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
def test_what_is_no_file_of_notes_says_nothing_and_is_left_as_it_is(tmp_path, monkeypatch, caplog, make):
    monkeypatch.setattr(notes, "MAX_BYTES", 1000)
    make(tmp_path / "n")
    before = (tmp_path / "n").lstat()
    assert notes.read_notes(tmp_path / "n") == set()
    notes.add_notes(tmp_path / "n", ["a"])
    after = (tmp_path / "n").lstat()
    assert (after.st_mode, after.st_size) == (before.st_mode, before.st_size)
    assert "remove it" in caplog.text


def test_notes_are_read_as_they_were_added(tmp_path):
    notes.add_notes(tmp_path / "f/n", ["a", "b"])
    notes.add_notes(tmp_path / "f/n", ["c"])
    assert notes.read_notes(tmp_path / "f/n") == {"a", "b", "c"}

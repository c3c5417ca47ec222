"""Pixels that wait on disk are the same pixels, leave nothing behind, and stay in memory where the disk is full."""

import errno
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from family_caches import build
from tiny_families import save_tiny

from tests.stage1_teacher.test_extract import tree
from vlm_distill_cache.data.images.byte_pixels import BytePixels, held_of
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop import spool
from vlm_distill_cache.stage1_teacher.loop.spool import Spool
from vlm_distill_cache.stage1_teacher.planning.open import open_build


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """Its pictures have one tile or several."""
    return save_tiny("llava_next", tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture
def samples(teacher, family_data, tmp_path):
    options = {"teacher": str(teacher), "data": str(family_data), "dtype": "float32", "batch_size": 4}
    work = open_build(BuildConfig(cache=str(tmp_path / "none"), **options))
    return [work.encoder(sample) for sample in open_dataset(str(family_data))]


def is_open(folder: Path) -> bool:
    """Whether this process has a file open that is, or was, in a folder."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(path.readlink())
    return any(path.is_relative_to(folder) for path in found)


def test_what_is_put_away_reads_as_it_was_and_is_gone_with_the_samples(tmp_path, samples, monkeypatch):
    monkeypatch.setattr(spool, "IN_MEMORY", 2)
    place = Spool(tmp_path)
    away = [place.put_away(sample) for sample in samples]
    assert [found is sample for found, sample in zip(away, samples, strict=True)] == [True] * 2 + [False] * 7 + [True]
    for found, sample in zip(away, samples, strict=True):
        for (name, read), (known, array) in zip(
            held_of(found.image_inputs).items(), held_of(sample.image_inputs).items(), strict=True
        ):
            assert name == known
            assert isinstance(read, BytePixels) == isinstance(array, BytePixels)
            assert np.array_equal(found.image_inputs[name], sample.image_inputs[name])
    assert not list(tmp_path.iterdir())
    assert is_open(tmp_path)
    del place, away, found
    assert not is_open(tmp_path)


def test_a_full_disk_leaves_pixels_in_memory(tmp_path, samples, monkeypatch):
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    written = []

    def fill(file, data, offset, *, write=os.pwrite):
        written.append(file)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: max(1, len(data) // 2)], offset)  # in pieces, as it may be

    monkeypatch.setattr(os, "pwrite", fill)
    place = Spool(tmp_path)
    for sample in samples:
        found = place.put_away(sample)
        assert all(np.array_equal(found.image_inputs[name], array) for name, array in sample.image_inputs.items())
    assert len(written) == 6


def test_no_byte_of_a_cache_depends_on_where_pixels_wait(tmp_path, teacher, family_data, monkeypatch):
    build(teacher, family_data, tmp_path / "memory", shard_size=10)
    monkeypatch.setattr(spool, "IN_MEMORY", 1)
    build(teacher, family_data, tmp_path / "disk", shard_size=10)
    assert tree(tmp_path / "disk") == tree(tmp_path / "memory")

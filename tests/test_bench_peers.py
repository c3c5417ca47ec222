"""`make bench-peers`: every reader gets the same records, and the table says what was measured."""

import json
import sys

import numpy as np
import pytest

from tests.benchmarks import bench_peers, peer_readers
from tests.benchmarks.bench_docs import ROOT, TABLE_PAGE, table_in
from tests.benchmarks.bench_peers import BEGIN, END, PACKAGES, STORED, measure, table, write_records
from tests.benchmarks.peer_readers import Ours, read_records, sum_of
from tests.stage2_student.tiny_cache import build_tiny_cache
from vlm_distill_cache.common.opening import open_cache


@pytest.fixture
def cache_dir(tmp_path):
    build_tiny_cache(tmp_path / "cache", store="zarr")
    return tmp_path / "cache"


def test_records_and_order_reach_other_libraries_whole(cache_dir, tmp_path):
    write_records(cache_dir, tmp_path / "data")
    cache = open_cache(cache_dir)
    records = read_records(tmp_path / "data" / "records")
    assert len(records) == len(cache)
    for sample_id, found in zip(cache.sample_ids, records, strict=True):
        expected = cache.read(sample_id)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    order = np.load(tmp_path / "data" / "order.npy").tolist()
    assert sorted(order) == list(range(len(cache)))
    assert sum_of(Ours().read(cache_dir, order)) == sum_of(records)


def test_both_stores_of_ours_are_measured_and_who_reads_less_is_caught(cache_dir, tmp_path, monkeypatch):
    ours = {name: reader for name, reader in peer_readers.READERS.items() if reader is Ours}
    monkeypatch.setattr(bench_peers, "READERS", ours)
    monkeypatch.setattr(bench_peers, "PACKAGES", {})
    found = measure(cache_dir, tmp_path / "data", rounds=2)
    assert list(found) == ["ours, zarr", "ours, tar"]
    for values in found.values():
        assert len(values["cpu"]) == len(values["clock"]) == 2
        assert min(*values["cpu"], *values["clock"], values["megabytes"]) > 0
    seen = iter([(3, 5), (3, 4)])

    def run(reader, what, folder):
        count, total = next(seen)
        return json.dumps({"cpu": 1.0, "clock": 1.0, "count": count, "sum": total})

    monkeypatch.setattr(bench_peers, "_run", run)
    with pytest.raises(AssertionError, match="not read the same"):
        measure(cache_dir, tmp_path / "other", rounds=1)


def test_the_table_names_versions_ranges_and_the_machines_load():
    values = {"cpu": [1.0, 3.0, 2.0], "clock": [0.5, 0.6, 0.7], "megabytes": 4.25}
    machine = {"processor": "some", "cores": 2, "load": 0.5}
    text = table({"machine": machine, "readers": {"ours, tar": values, "litdata": values}})
    assert "| some, 2 cores, load 0.5 |" in text
    assert "| ours, tar | 2.0 (1.0 to 3.0) | 0.6 (0.5 to 0.7) | 4.2 |" in text
    assert f"| {PACKAGES['litdata'].replace('==', ' ')} | 2.0" in text
    assert table({"readers": {}}) == ""


def test_a_library_that_has_an_environment_is_not_installed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_peers, "FOLDER", tmp_path)
    called = []
    monkeypatch.setattr(bench_peers.subprocess, "run", lambda command, check: called.append(command[1:4]))
    assert str(bench_peers.environment_of("ours, zarr")) == sys.executable
    for name, asked in PACKAGES.items():
        (tmp_path / f"venv-{name}").mkdir()
        bench_peers.environment_of(name)
        (tmp_path / f"venv-{name}" / "made").read_text()
        count = len(called)
        bench_peers.environment_of(name)
        assert len(called) == count
        (tmp_path / f"venv-{name}" / "made").write_text(f"{asked}.old")
        bench_peers.environment_of(name)
        assert len(called) > count


@pytest.mark.skipif(not STORED.is_file(), reason="not run yet")
def test_the_page_has_the_table_of_what_is_stored():
    stored = json.loads(STORED.read_text())
    assert stored["packages"] == PACKAGES
    assert table_in((ROOT / TABLE_PAGE).read_text(), BEGIN, END) == table(stored)

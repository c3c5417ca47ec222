"""One contract for both stores, and what each promises to tools that know nothing of us."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from cache_factory import assert_equal_records, build_shard, make_plan, make_record, sample_id, tree

from vlm_distill_cache.common.cache.plan import write_plan
from vlm_distill_cache.common.cache.sidecar import read_sidecar, sidecar_path
from vlm_distill_cache.common.cache.stores import finish_shard, open_reader, open_writer
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError

ORDINARY = [p for p in range(8) if p != 3]


def write(folder, store, positions, index=0):
    plan = make_plan(store)
    writer = open_writer(store, folder, index, plan.all_fields)
    for position in positions:
        writer.append(sample_id(position), make_record(position))
    return writer


def read_all(folder, store, index=0):
    reader = open_reader(store, folder, index, make_plan(store).all_fields)
    records = {name: reader.read(i) for i, name in enumerate(reader.sample_ids)}
    reader.close()
    return records


def temporaries(cache_dir):
    return [path.name for path in (cache_dir / "shards").iterdir() if path.name.startswith(".tmp")]


def codecs_of(metadata):
    return metadata["codecs"][0]["configuration"]


class StoreContract:
    """Every store passes these."""

    store: str
    path: str

    def test_records_come_back_as_they_were(self, tmp_path):
        finish_shard(write(tmp_path, self.store, ORDINARY))
        records = read_all(tmp_path, self.store)
        assert list(records) == [sample_id(p) for p in ORDINARY]
        for position in ORDINARY:
            assert_equal_records(records[sample_id(position)], make_record(position))

    def test_records_belong_to_the_caller(self, tmp_path):
        finish_shard(write(tmp_path, self.store, [5]))
        reader = open_reader(self.store, tmp_path, 0, make_plan().all_fields)
        reader.read(0)["labels"][:] = 0
        assert_equal_records(reader.read(0), make_record(5))
        assert all(array.flags.writeable for array in reader.read(0).values())
        reader.close()

    def test_single_fields_can_be_read(self, tmp_path):
        finish_shard(write(tmp_path, self.store, ORDINARY))
        reader = open_reader(self.store, tmp_path, 0, make_plan().all_fields)
        assert len(reader) == len(ORDINARY)
        assert reader.read(1, ["labels"]).keys() == {"labels"}
        with pytest.raises(CacheFormatError, match=r"no fields \['hidden'\]"):
            reader.read(1, ["hidden"])
        for position in (-1, len(ORDINARY)):
            with pytest.raises(IndexError, match=f"no record {position}"):
                reader.read(position)
        reader.check()
        reader.close()

    def test_an_empty_shard_is_a_shard(self, tmp_path):
        sidecar = finish_shard(write(tmp_path, self.store, []), [("x", "unreadable")])
        assert read_all(tmp_path, self.store) == {}
        assert (sidecar.rows, sidecar.sample_ids, sidecar.failed) == (0, (), (("x", "unreadable"),))

    def test_the_sidecar_counts_what_was_written(self, tmp_path):
        sidecar = finish_shard(write(tmp_path, self.store, ORDINARY))
        records = [make_record(p) for p in ORDINARY]
        assert sidecar.rows == sum(len(r["labels"]) for r in records)
        assert sidecar.field_bytes == {n: sum(r[n].nbytes for r in records) for n in records[0]}
        assert sidecar.files.keys() == {n for n in tree(tmp_path) if n != "shards/00000.json"}
        assert read_sidecar(tmp_path, 0) == sidecar

    def test_equal_records_give_equal_bytes(self, tmp_path):
        for folder in ("a", "b"):
            finish_shard(write(tmp_path / folder, self.store, ORDINARY))
        thread = threading.Thread(target=lambda: finish_shard(write(tmp_path / "c", self.store, ORDINARY)))
        thread.start()
        thread.join()
        assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")

    def test_a_record_that_does_not_fit_is_refused(self, tmp_path):
        writer = write(tmp_path, self.store, [4])
        with pytest.raises(CacheFormatError, match="appended twice"):
            writer.append(sample_id(4), make_record(4))
        with pytest.raises(CacheFormatError, match=r"shard 0, sample 'x': missing fields \['labels'\]"):
            writer.append("x", {k: v for k, v in make_record(5).items() if k != "labels"})
        for name in ("", "é" * 3000):
            with pytest.raises(CacheFormatError, match="a sample id is a text"):
                writer.append(name, make_record(6))
        finish_shard(writer)
        assert list(read_all(tmp_path, self.store)) == [sample_id(4)]

    def test_nothing_is_visible_before_publishing_and_nothing_left_after_aborting(self, tmp_path):
        writer = write(tmp_path, self.store, ORDINARY)
        assert not (tmp_path / self.path).exists()
        writer.abort()
        writer.abort()
        assert tree(tmp_path) == {}

    def test_two_writers_that_agree_are_no_conflict(self, tmp_path):
        first, second = write(tmp_path, self.store, ORDINARY), write(tmp_path, self.store, ORDINARY)
        sidecar = finish_shard(first)
        assert finish_shard(second) == sidecar
        assert len(read_all(tmp_path, self.store)) == len(ORDINARY)
        assert temporaries(tmp_path) == []

    def test_of_two_writers_that_differ_the_second_says_so_and_harms_nothing(self, tmp_path):
        first, second = write(tmp_path, self.store, ORDINARY), write(tmp_path, self.store, [4, 5])
        finish_shard(first)
        before = {name: data for name, data in tree(tmp_path).items() if ".tmp-" not in name}
        with pytest.raises(CacheMismatchError, match="another process published this shard"):
            finish_shard(second)
        assert tree(tmp_path) == before

    def test_a_finished_shard_is_not_opened_for_writing(self, tmp_path):
        finish_shard(write(tmp_path, self.store, [4]))
        with pytest.raises(CacheMismatchError, match="shard 0 is already finished"):
            write(tmp_path, self.store, [4])

    def test_a_shard_published_without_sidecar_is_made_anew(self, tmp_path):
        writer = write(tmp_path, self.store, [4, 5])
        writer.close()
        other = write(tmp_path, self.store, ORDINARY)  # the first one lives: it keeps its shard
        assert (tmp_path / self.path).exists()
        with pytest.raises(CacheMismatchError):
            finish_shard(other)
        writer.abort()  # as its death would, before the sidecar
        finish_shard(write(tmp_path, self.store, ORDINARY))
        assert len(read_all(tmp_path, self.store)) == len(ORDINARY)

    def test_leftovers_of_a_killed_writer_are_removed(self, tmp_path):
        (tmp_path / "shards").mkdir()
        for name in (".tmp-00000.tar-1-ab", ".tmp-00000.json-1-ab", ".tmp-00001.tar-1-ab"):
            (tmp_path / "shards" / name).write_bytes(b"half")
        (tmp_path / "shards" / ".tmp-00000.zarr-1-ab").mkdir()
        finish_shard(write(tmp_path, self.store, [4]))
        assert temporaries(tmp_path) == [".tmp-00001.tar-1-ab"]

    def test_killed_anywhere_and_resumed_the_bytes_are_the_same(self, tmp_path):
        self.check_every_kill(tmp_path, stride={"zarr": 13, "webdataset": 4}[self.store])

    @pytest.mark.slow
    def test_killed_at_every_place_and_resumed_the_bytes_are_the_same(self, tmp_path):
        self.check_every_kill(tmp_path, stride=1)

    def check_every_kill(self, tmp_path, stride):
        script = Path(__file__).parents[1] / "kill_everywhere.py"
        root = script.parents[2]
        result = subprocess.run(
            [sys.executable, script, self.store, tmp_path, str(stride)],
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{script.parent}"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert int(result.stdout) > 8

    def test_missing_and_linked_shards_are_refused(self, tmp_path):
        with pytest.raises(CacheFormatError, match="the shard is missing"):
            read_all(tmp_path, self.store)
        finish_shard(write(tmp_path / "real", self.store, [4]))
        (tmp_path / "shards").mkdir()
        (tmp_path / self.path).symlink_to(tmp_path / "real" / self.path)
        with pytest.raises(CacheFormatError, match="the shard is missing"):
            read_all(tmp_path, self.store)

    def test_reading_is_safe_from_several_threads(self, tmp_path):
        finish_shard(write(tmp_path, self.store, ORDINARY))
        reader = open_reader(self.store, tmp_path, 0, make_plan().all_fields)
        wrong = []

        def run():
            for _ in range(5):
                for i, position in enumerate(ORDINARY):
                    if reader.read(i)["labels"].tolist() != make_record(position)["labels"].tolist():
                        wrong.append(position)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        reader.close()


class TestZarr(StoreContract):
    store = "zarr"
    path = "shards/00000.zarr"

    def test_plain_zarr_opens_a_shard(self, tmp_path):
        finish_shard(write(tmp_path, "zarr", ORDINARY))
        group = zarr.open_group(tmp_path / self.path, mode="r")
        names = bytes(group["sample_ids"][:])
        bounds = group["sample_ids_offsets"][:]
        for i, position in enumerate(ORDINARY):
            assert names[bounds[i] : bounds[i + 1]].decode() == sample_id(position)
            for name, array in make_record(position).items():
                start, stop = group[f"{name}_offsets"][i : i + 2]
                np.testing.assert_array_equal(group[name][start:stop], array)

    def test_consolidated_metadata_is_that_of_the_arrays(self, tmp_path):
        finish_shard(write(tmp_path, "zarr", [4]))
        root = json.loads((tmp_path / self.path / "zarr.json").read_text())
        for name, metadata in root["consolidated_metadata"]["metadata"].items():
            assert metadata == json.loads((tmp_path / self.path / name / "zarr.json").read_text())
            [sharding] = metadata["codecs"]
            assert sharding["name"] == "sharding_indexed"
            blosc = sharding["configuration"]["codecs"][1]["configuration"]
            assert blosc["shuffle"] == ("noshuffle" if metadata["data_type"] == "uint8" else "shuffle")

    def test_a_field_larger_than_a_chunk_is_one_file(self, tmp_path):
        record = make_record(4)
        record["tiles"] = np.random.default_rng(0).random((40_000, 6)).astype(np.float32)
        writer = write(tmp_path, "zarr", [])
        writer.append("big", record)
        finish_shard(writer)
        assert_equal_records(read_all(tmp_path, "zarr")["big"], record)
        assert len([n for n in tree(tmp_path / self.path) if n.startswith("tiles/c/")]) == 1

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("labels", lambda m: m.update(shape=[1 << 50]), "bytes in chunks of .* are believed"),
            ("labels", lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[1 << 40]), "believed"),
            ("labels", lambda m: codecs_of(m).update(chunk_shape=[1 << 40]), "believed"),
            ("labels", lambda m: codecs_of(m)["codecs"].append({"name": "numcodecs.pickle"}), "refused"),
            ("labels", lambda m: m.update(shape=[-1]), "damaged"),
            ("labels", lambda m: m.update(data_type="float64"), "declares float64"),
            ("labels", lambda m: m.pop("codecs"), "no metadata of an array"),
            ("labels", lambda m: m.update(shape=[3]), "do not fit labels"),
            ("labels_offsets", lambda m: m.update(shape=[2]), "do not fit labels"),
            ("sample_ids", lambda m: m.update(shape=[1 << 30]), "are believed"),
        ],
    )  # fmt: skip
    def test_metadata_that_lies_is_refused_before_it_costs_anything(self, tmp_path, name, change, message):
        finish_shard(write(tmp_path, "zarr", ORDINARY))
        path = tmp_path / self.path / "zarr.json"
        root = json.loads(path.read_text())
        change(root["consolidated_metadata"]["metadata"][name])
        path.write_text(json.dumps(root))
        with pytest.raises(CacheFormatError, match=message):
            read_all(tmp_path, "zarr")

    @pytest.mark.parametrize(
        "change",
        [
            lambda r: r["attributes"].update(samples=1 << 40),
            lambda r: r["attributes"].update(samples=1.5),
            lambda r: r.update(node_type="array"),
            lambda r: r.pop("consolidated_metadata"),
            lambda r: r.update(consolidated_metadata=[]),
        ],
    )
    def test_groups_that_are_no_shard_are_refused(self, tmp_path, change):
        finish_shard(write(tmp_path, "zarr", [4]))
        path = tmp_path / self.path / "zarr.json"
        root = json.loads(path.read_text())
        change(root)
        path.write_text(json.dumps(root))
        with pytest.raises(CacheFormatError):
            read_all(tmp_path, "zarr")

    def test_missing_files_and_links_inside_are_refused(self, tmp_path):
        finish_shard(write(tmp_path, "zarr", ORDINARY))
        data = tmp_path / self.path / "labels" / "c" / "0"
        kept = data.read_bytes()
        data.unlink()
        with pytest.raises(CacheFormatError, match="its data is missing"):  # zarr would read zeros
            read_all(tmp_path, "zarr")
        (tmp_path / "elsewhere").write_bytes(kept)
        data.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CacheFormatError, match="a link or device"):
            read_all(tmp_path, "zarr")
        (tmp_path / self.path / "zarr.json").unlink()
        data.unlink()
        with pytest.raises(CacheFormatError, match="missing"):
            read_all(tmp_path, "zarr")


def test_unknown_stores_are_refused(tmp_path):
    with pytest.raises(CacheFormatError, match="store 'hdf5'; expected one of zarr, webdataset"):
        open_writer("hdf5", tmp_path, 0, ())


def test_a_shard_is_built_again_in_the_other_store_after_a_kill(tmp_path):
    plan = make_plan("zarr")
    write_plan(tmp_path, plan)
    write(tmp_path, "webdataset", [4]).close()  # published, no sidecar, and its writer is gone
    build_shard(tmp_path, plan, 0)
    assert sidecar_path(tmp_path, 0).exists()
    assert not (tmp_path / "shards" / "00000.tar").exists()
    shutil.rmtree(tmp_path)

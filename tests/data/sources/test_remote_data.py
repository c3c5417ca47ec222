"""Tars and parquet files at addresses are read as they are here, whatever happens on the way."""

import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import Fault, FaultyServer, s3_client, s3_environment, serve_nginx, serve_s3
from test_kept_indexes import samples, seen, write_tar

from vlm_distill_cache.common.errors import DataError, TransferError
from vlm_distill_cache.common.remotes import copies, streams
from vlm_distill_cache.data.registry import open_dataset


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of two tars and two parquet files."""
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "near"))
    monkeypatch.setattr(streams, "wait", lambda seconds: None)
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        write_tar(folder / f"{number}.tar", samples(3 * number, 3))
        rows = [{"caption": f"a circle {i}", "image": {"bytes": samples(i, 1)[1][1], "path": None}} for i in range(4)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet")
    copies._opened.cache_clear()
    yield folder
    copies._opened.cache_clear()


def check(data, address):
    for ending in ("tar", "parquet"):
        here = open_dataset(f"{data}/{{0..1}}.{ending}:streaming=true")
        there = open_dataset(f"{address}/{{0..1}}.{ending}")
        assert seen(there) == seen(here)
        assert there.fingerprint() == here.fingerprint()
        assert list(there.sample_ids) == list(here.sample_ids)
        assert there.origin["address"].startswith(address)


def test_a_store_of_s3_is_read_as_a_folder_is(data, monkeypatch):
    with serve_s3("data") as url:
        for name, value in s3_environment(url).items():
            monkeypatch.setenv(name, value)
        for path in data.iterdir():
            s3_client(url).upload_file(str(path), "data", f"some/{path.name}")
        check(data, "s3://data/some")
        with pytest.raises(DataError, match=r"s3://data/some/9\.tar: there is no such file"):
            open_dataset("s3://data/some/9.tar")


def test_a_web_server_is_read_as_a_folder_is(data, tmp_path):
    with serve_nginx(data, tmp_path / "nginx") as url:
        check(data, url)


def test_files_come_once_and_leave_when_there_is_no_room(data, tmp_path, monkeypatch):
    with serve_nginx(data, tmp_path / "nginx") as url:
        fetched = []
        fetch = copies.RemoteFile._fetch
        monkeypatch.setattr(
            copies.RemoteFile, "_fetch", lambda file, path: fetched.append(file.name) or fetch(file, path)
        )
        seen(open_dataset(f"{url}/{{0..1}}.tar"))
        seen(open_dataset(f"{url}/{{0..1}}.tar"))
        assert fetched == ["0.tar", "1.tar"]
        shutil.rmtree(tmp_path / "near" / "files")
        monkeypatch.setenv("VLM_DISTILL_CACHE_BYTES", str((data / "0.tar").stat().st_size + 1))
        seen(open_dataset(f"{url}/{{0..1}}.tar"))
        assert [path.name for path in (tmp_path / "near" / "files").glob("*/*.tar")] == ["1.tar"]


def test_another_file_at_the_same_address_is_noticed(data, tmp_path):
    with serve_nginx(data, tmp_path / "nginx") as url:
        before, rows = open_dataset(f"{url}/{{0..1}}.tar"), open_dataset(f"{url}/{{0..1}}.parquet")
        shutil.rmtree(tmp_path / "near" / "files")
        for name in ("0.tar", "0.parquet"):
            shutil.copyfile(data / "1.tar", data / name)
            os.utime(data / name, (1, 1))
        with pytest.raises(TransferError, match=r"0\.tar changed while it was read"):
            before[0]
        with pytest.raises(DataError, match=r"0\.parquet changed while it was read"):
            seen(rows)
        write_tar(data / "0.tar", samples(50, 2))
        os.utime(data / "0.tar", (2, 2))  # nginx tells files by their size and second
        after = open_dataset(f"{url}/{{0..1}}.tar")
        assert list(after.sample_ids)[:2] == ["k0050", "k0051"]
        assert after.fingerprint() != before.fingerprint()


def test_servers_that_send_whole_files_serve_tars_and_are_named_for_parquet(data, tmp_path):
    with serve_nginx(data, tmp_path / "nginx") as url, FaultyServer(upstream=url) as server:
        server.always = Fault(whole=True)
        assert seen(open_dataset(f"{server.url}/0.tar")) == seen(open_dataset(str(data / "0.tar")))
        with pytest.raises(DataError, match="sends whole files only"):
            open_dataset(f"{server.url}/0.parquet")


def test_what_an_address_may_not_say_is_refused(data):
    for address, message in (
        ("https://h.test/a.tar?key=1", "the query may be a key"),
        ("s3://b/*.tar", "say which there are in braces"),
    ):
        with pytest.raises(DataError, match=message):
            open_dataset(address)


def test_a_connection_that_breaks_is_taken_up_where_it_ended(data, tmp_path):
    with serve_nginx(data, tmp_path / "nginx") as url, FaultyServer(upstream=url) as server:
        here = seen(open_dataset(str(data / "0.tar")))
        server.faults = [Fault(), Fault(), Fault(cut=700), Fault(status=503)]
        assert seen(open_dataset(f"{server.url}/0.tar")) == here
        assert "bytes=700-" in [wanted for _, _, wanted in server.requests]
        server.faults = [Fault(), Fault(cut=5), Fault(status=503)]
        rows = open_dataset(f"{server.url}/0.parquet")
        server.faults = [Fault(cut=5)]
        assert len(seen(rows)) == 4

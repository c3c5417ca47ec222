"""Every kind of remote keeps one contract, and each failure of a server ends in the file or in a clear error."""

import pickle
from pathlib import Path
from types import MappingProxyType

import huggingface_hub.constants
import pytest
from hub_server import TOKEN, HubServer
from servers import Fault, FaultyServer, s3_environment, serve_nginx

from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, TransferError
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.remotes.directory import DirectoryRemote

SIZE = 12_345
DATA = bytes(i * i % 251 for i in range(SIZE))
ODD = "shards/a b/%41#ü?&+.bin"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of the hub's library
    pytest.mark.usefixtures("waits"),
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(tmp_path / "hub") as server:
        use_hub(monkeypatch, server.url)
        yield server


def use_hub(monkeypatch, url: str) -> None:
    for name, value in {
        "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


class ReadContract:
    """What reading keeps, whatever the kind; a subclass brings the fixture ``place``: an address, holding FILES."""

    FILES = MappingProxyType({"one.bin": DATA, "deep/er/two.json": b"{}", "empty": b"", ODD: b"odd"})

    @pytest.fixture
    def remote(self, place):
        return open_remote(place)

    def test_files_are_read_whole(self, remote):
        assert {name: remote.read(name, max_bytes=SIZE) for name in self.FILES} == self.FILES

    def test_sizes_are_known_without_reading(self, remote):
        assert {name: remote.size(name) for name in self.FILES} == {n: len(d) for n, d in self.FILES.items()}

    def test_what_is_absent_is_absent_and_no_error_of_the_network(self, remote, tmp_path):
        assert remote.size("deep/nothing") is None
        with pytest.raises(FileNotFoundError):
            remote.read("deep/nothing", max_bytes=10)
        with pytest.raises(FileNotFoundError):
            remote.download("deep/nothing", tmp_path / "x", size=10)

    def test_a_file_larger_than_the_bound_is_refused(self, remote):
        with pytest.raises(CacheFormatError, match="larger than 12344 bytes"):
            remote.read("one.bin", max_bytes=SIZE - 1)

    @pytest.mark.parametrize("have", [0, 1, 5_000, SIZE])
    def test_a_download_goes_on_at_the_end_of_what_is_there(self, remote, tmp_path, have):
        target, counted = tmp_path / "target", []
        target.write_bytes(DATA[:have])
        remote.download("one.bin", target, size=SIZE, on_bytes=counted.append)
        assert target.read_bytes() == DATA
        assert sum(counted) == SIZE - have

    def test_a_download_begins_again_where_there_is_more_than_the_file_has(self, remote, tmp_path):
        target = tmp_path / "target"
        target.write_bytes(b"x" * (SIZE + 1))
        remote.download("one.bin", target, size=SIZE)
        assert target.read_bytes() == DATA

    @pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1])
    def test_a_file_of_another_size_is_an_error_and_at_most_size_bytes_are_taken(self, remote, tmp_path, size):
        with pytest.raises(TransferError, match=rf"{SIZE} bytes; expected {size}"):
            remote.download("one.bin", tmp_path / "target", size=size)
        assert not any(tmp_path.glob("target")) or (tmp_path / "target").stat().st_size == 0

    def test_an_empty_file_arrives(self, remote, tmp_path):
        remote.download("empty", tmp_path / "target", size=0)
        assert (tmp_path / "target").read_bytes() == b""

    def test_a_copy_for_another_process_reads_the_same(self, remote):
        copied = pickle.loads(pickle.dumps(remote))  # noqa: S301, as loaders' worker processes do
        assert copied.read("one.bin", max_bytes=SIZE) == DATA


class WriteContract(ReadContract):
    """What writing keeps too; ``place`` is filled by it."""

    @pytest.fixture
    def place(self, empty_place, tmp_path):
        remote, local = open_remote(empty_place), {}
        for number, (name, data) in enumerate(self.FILES.items()):
            local[name] = tmp_path / f"local-{number}"
            local[name].write_bytes(data)
        counted = []
        assert remote.create("begun", b"1")
        remote.upload(local, on_bytes=counted.append)
        assert sum(counted) == sum(map(len, self.FILES.values()))
        return empty_place

    def test_an_upload_replaces_what_was_there(self, remote, tmp_path):
        (tmp_path / "new").write_bytes(b"new")
        remote.upload({"one.bin": tmp_path / "new"})
        assert remote.read("one.bin", max_bytes=10) == b"new"

    def test_creating_does_not_replace(self, remote):
        assert not remote.create("begun", b"2")
        assert remote.create("deep/new", b"3")
        assert remote.read("begun", max_bytes=10) + remote.read("deep/new", max_bytes=10) == b"13"

    def test_deleted_files_are_absent_and_deleting_absent_ones_is_fine(self, remote):
        remote.delete(["one.bin", "nothing", ODD])
        assert [remote.size(name) for name in ("one.bin", ODD, "empty")] == [None, None, 0]


class TestDirectoryRemote(WriteContract):
    @pytest.fixture
    def empty_place(self, tmp_path):
        return tmp_path / "remote"

    def test_a_pipe_is_refused_instead_of_waited_for(self, tmp_path):
        import os

        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CacheFormatError, match="not a plain file"):
            DirectoryRemote(tmp_path).read("pipe", max_bytes=1)


class TestS3Remote(WriteContract):
    @pytest.fixture
    def empty_place(self, s3, tmp_path, monkeypatch):
        for name, value in s3_environment(s3).items():
            monkeypatch.setenv(name, value)
        return f"s3://caches/{tmp_path.name}/sub"

    def test_a_store_that_is_not_there_or_not_ours_is_a_clear_error(self, empty_place, monkeypatch):
        with pytest.raises(TransferError, match="no bucket 'nowhere'; create it"):
            open_remote("s3://nowhere/x").create("a", b"")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nothing")
        with pytest.raises(TransferError, match="credentials; set AWS_ACCESS_KEY_ID"):
            open_remote(empty_place).size("a")


class TestHubRemote(WriteContract):
    @pytest.fixture
    def empty_place(self, hub):
        return "hf://datasets/org/name@v1/sub"

    def test_a_new_repository_is_private(self, hub, place):
        assert hub.created == [{"name": "name", "organization": "org", "type": "dataset", "visibility": "private"}]

    def test_an_upload_is_one_commit(self, hub, place):
        assert [len(names) for names in hub.commits] == [1, len(self.FILES)]

    def test_whoever_holds_it_notices_the_commit_of_another(self, hub, place, remote, tmp_path):
        (tmp_path / "new").write_bytes(b"new")
        with remote.hold():
            remote.upload({"one": tmp_path / "new"})
            remote.upload({"two": tmp_path / "new"})
            assert open_remote(place).create("theirs", b"1")
            with pytest.raises(CacheMismatchError, match="changed by another push meanwhile"):
                remote.upload({"three": tmp_path / "new"})
        remote.upload({"three": tmp_path / "new"})

    def test_an_answer_that_makes_no_sense_is_asked_for_again(self, hub, remote, tmp_path):
        (tmp_path / "new").write_bytes(b"new")
        hub.concerns = lambda method, path: method == "POST"
        hub.faults = [Fault(status=200, body=body) for body in (b"", b"{", b"[]", b"{}")]
        remote.upload({"new": tmp_path / "new"})
        assert hub.faults == []
        assert remote.read("new", max_bytes=9) == b"new"

    def test_the_token_stays_with_the_hub_when_it_sends_us_elsewhere(self, hub, remote):
        with FaultyServer(hub.root) as elsewhere:
            hub.redirect = elsewhere.url
            assert remote.read("one.bin", max_bytes=SIZE) == DATA
        assert elsewhere.secrets == [None]

    def test_who_is_not_logged_in_is_told_how(self, hub, remote, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "wrong")
        for action in (
            lambda: remote.size("one.bin"),
            lambda: remote.create("x", b""),
            lambda: remote.delete(["x"]),
        ):
            with pytest.raises(TransferError, match="hf auth login"):
                action()


class TestHttpRemote(ReadContract):
    @pytest.fixture
    def place(self, tmp_path):
        for name, data in self.FILES.items():
            (tmp_path / "served" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "served" / name).write_bytes(data)
        with serve_nginx(tmp_path, tmp_path / "nginx") as url:
            yield f"{url}/served/"

    def test_it_cannot_be_written(self, remote, tmp_path):
        for action in (lambda: remote.upload({}), lambda: remote.create("a", b""), lambda: remote.delete([])):
            with pytest.raises(TransferError, match="pull only; to write"):
                action()


@pytest.mark.parametrize("location", [
    "s3://", "s3://bucket//x", "hf://datasets/only", "hf://models/a/b", "hf://datasets/a/b/../c", "https://", "http://a:b/c",
    "https://user:secret@host/x", "s3://key:secret@bucket/x", "s3://bucket/x?k=secret", "ftp://me:secret@host/x",
    "http://me:secret@h st/?k=secret", "http://host/a b", "http://host/a#b", "http://h\u00f6st/a", "ftp://host/x", "file:///x",
])  # fmt: skip
def test_an_address_that_cannot_be_meant_is_refused_before_anything_is_sent(location, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError) as caught:
        open_remote(location)
    assert "secret" not in str(caught.value)


def test_an_address_may_have_letters_of_any_language(tmp_path):
    (tmp_path / "\u00fc 1").mkdir()
    (tmp_path / "\u00fc 1" / "a").write_bytes(b"here")
    with serve_nginx(tmp_path, tmp_path / "nginx") as url:
        for name in ("\u00fc%201", "%C3%BC%201"):
            assert open_remote(f"{url}/{name}").read("a", max_bytes=9) == b"here"


def test_a_library_that_is_missing_or_a_hub_that_is_off_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm-distill-cache\[s3\]'"):
        open_remote("s3://bucket/x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        open_remote("hf://datasets/a/b")


def test_paths_are_no_addresses():
    assert all(is_url(text) for text in ("s3://b/x", "hf://datasets/a/b", "http://h/x", "https://h"))
    assert not any(is_url(text) for text in ("/s3/x", "s3", "http:/x", "c:/x", Path("s3://b")))


@pytest.mark.parametrize(
    "address", ["s3://KEY:HID/DEN@bucket/a", "s3://HIDDEN@bucket/a", "hf://me:HIDDEN@datasets/o/n"]
)
def test_keys_in_an_address_are_refused_and_not_repeated(address: str):
    with pytest.raises(ConfigError, match=r"expected an address alone.*AWS_ACCESS_KEY_ID.*HF_TOKEN") as caught:
        open_remote(address)
    assert "KEY:" not in str(caught.value)
    assert "HIDDEN" not in str(caught.value)

"""What an S3 store may answer beside failures of the network: conditions, conflicts, refusals."""

import pytest
from servers import Fault, FaultyServer, s3_environment

from vlm_distill_cache.common.errors import TransferError
from vlm_distill_cache.common.printing import message
from vlm_distill_cache.common.remotes import open_remote

pytestmark = pytest.mark.usefixtures("waits")


@pytest.fixture
def server(s3, monkeypatch):
    with FaultyServer(upstream=s3) as server:
        for variable, value in s3_environment(server.url).items():
            monkeypatch.setenv(variable, value)
        server.concerns = lambda method, path: method in ("PUT", "GET")
        yield server


def error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code></Error>".encode()


def test_a_store_without_conditional_writes_is_looked_at_first(server):
    for data, is_new in ((b"1", True), (b"2", False)):
        server.faults = [Fault(status=501)]
        assert open_remote("s3://caches/unconditional").create("new", data) == is_new
        assert server.faults == []
    assert open_remote("s3://caches/unconditional").read("new", max_bytes=9) == b"1"


def test_two_that_create_at_once_are_tried_again_until_one_has(server):
    server.faults = [Fault(status=409, body=error("ConditionalRequestConflict"))] * 2
    assert open_remote("s3://caches/conflict").create("new", b"1")
    assert server.faults == []


@pytest.mark.parametrize(("body", "words"), [
    (b"", "answered 400 Bad Request; check"),
    (b"<html><p>no", "answered 400 Bad Request; check"),
    (b"<Error><Code><a/></Code></Error>", "makes no sense"),
    (error("Odd").replace(b"</Code>", b"</Code><Message>a\n\nerror: b</Message>"), r"Request \(Odd a error: b\); check"),
    (error("Odd").replace(b"Odd", b"'a\\" * 300_000), "; check the address"),
], ids=["empty", "page", "no text", "lines", "long"])  # fmt: skip
def test_what_a_store_says_is_one_short_line_of_ours(server, body, words):
    server.always = Fault(status=400, body=body)
    with pytest.raises(TransferError, match=words) as caught:
        open_remote("s3://caches/odd", attempts=1).read("file.bin", max_bytes=9)
    assert len(str(caught.value).splitlines()) == 1
    assert len(message(str(caught.value))) < 600


@pytest.mark.parametrize(("code", "words"), [
    ("AccessDenied", "check the credentials"), ("NoSuchBucket", "there is no bucket 'caches'"),
    ("InvalidRequest", "InvalidRequest"),
])  # fmt: skip
def test_what_a_store_refuses_for_good_is_not_tried_again(server, tmp_path, waits, code, words):
    server.always = Fault(status=403, body=error(code))
    (tmp_path / "local").write_bytes(b"x")
    remote = open_remote("s3://caches/refused")
    for action in (
        lambda: remote.upload({"file.bin": tmp_path / "local"}),
        lambda: remote.create("file.bin", b"x"),
        lambda: remote.read("file.bin", max_bytes=9),
    ):
        with pytest.raises(TransferError, match=words):
            action()
    assert waits == []
    assert len(server.requests) == 3

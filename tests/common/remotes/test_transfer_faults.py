"""Servers that fail: whatever may pass is tried again from where it stopped, and the rest is a clear error."""

import errno
import functools
import threading
import time

import numpy as np
import pytest
from cache_factory import build_cache, make_plan, tree
from servers import FAULTS as KNOWN
from servers import REDIRECTS, Fault, FaultyServer, own_certificate, s3_environment

import vlm_distill_cache.common.remotes.pull
from vlm_distill_cache.common.cache.sidecar import FileEntry
from vlm_distill_cache.common.errors import CacheFormatError, TransferError
from vlm_distill_cache.common.remotes import base, http, open_remote, streams
from vlm_distill_cache.common.remotes import fetch as fetch_module
from vlm_distill_cache.common.remotes.fetch import fetch_files
from vlm_distill_cache.common.remotes.pull import pull
from vlm_distill_cache.common.remotes.push import push

pytestmark = pytest.mark.usefixtures("waits")

SIZE = 300_000  # several blocks of the network
DATA = np.random.default_rng(0).bytes(SIZE)

FAULTS = {
    "nothing": [],
    "cut": [Fault(cut=200_000), Fault(cut=1), Fault(cut=99_000)],
    "cut before the first byte": [Fault(cut=0), Fault(cut=0)],
    "busy": [Fault(status=503), Fault(status=500), Fault(status=429, headers={"Retry-After": "7"})],
    "no ranges": [Fault(cut=200_000), Fault(whole=True)],
    "no ranges, cut again": [Fault(cut=200_000), Fault(whole=True, cut=100_000), Fault(whole=True)],
    "another range": [
        Fault(cut=200_000),
        Fault(headers={"Content-Range": f"bytes 100000-{SIZE - 1}/{SIZE}"}),
    ],
    "nonsense for a range": [Fault(cut=200_000), Fault(headers={"Content-Range": "nonsense"})],
    "range refused": [Fault(cut=200_000), Fault(status=416)],
    "longer than it is": [Fault(extra=b"x" * 50_000)],
}
HTTP_FAULTS = FAULTS | {
    "of unknown length": [Fault(chunked=True)],
    "of unknown length and cut": [Fault(chunked=True, cut=200_000)],
    "longer than it is, unannounced": [Fault(chunked=True, extra=b"x" * 50_000)],
    "an empty page": [Fault(status=200)],
    "damaged on the way": [Fault(flip=True)],
}
MOST_SENT = dict.fromkeys(FAULTS, 2.2) | dict.fromkeys(HTTP_FAULTS, 2.2)  # times the file's size
MOST_SENT |= dict.fromkeys(("nothing", "cut", "cut before the first byte", "busy", "of unknown length",
                            "of unknown length and cut", "an empty page"), 1.0)  # fmt: skip


WAIT = streams.wait


@pytest.fixture
def server(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file.bin").write_bytes(DATA)
    with FaultyServer(tmp_path / "root") as server:
        yield server


def fetch(remote, folder, data: bytes = DATA):
    return fetch_files(remote, folder, {"file.bin": FileEntry.of_bytes(data)}, jobs=1)


@pytest.mark.parametrize("name", HTTP_FAULTS)
def test_a_file_arrives_through_whatever_passes(server, tmp_path, name, waits):
    server.faults = list(HTTP_FAULTS[name])
    moved = fetch(open_remote(server.url), tmp_path / "here")
    assert tree(tmp_path / "here") == {"file.bin": DATA}
    assert server.faults == []
    # What had arrived is not sent again, unless the server knows no ranges or what arrived was wrong.
    assert server.sent["/file.bin"] <= SIZE * MOST_SENT[name]
    assert moved.bytes <= server.sent["/file.bin"]
    assert len(waits) <= len(HTTP_FAULTS[name])
    assert all(0 < seconds < 31 for seconds in waits)
    assert (7.0 in waits) == (name == "busy")


@pytest.mark.parametrize("name", FAULTS)
def test_an_object_arrives_through_whatever_passes(s3, tmp_path, monkeypatch, name):
    (tmp_path / "local").write_bytes(DATA)
    with FaultyServer(upstream=s3) as server:
        for variable, value in s3_environment(server.url).items():
            monkeypatch.setenv(variable, value)
        remote = open_remote("s3://caches/faults")
        remote.upload({"file.bin": tmp_path / "local"})
        server.faults = list(FAULTS[name])
        fetch(remote, tmp_path / "here")
        assert tree(tmp_path / "here") == {"file.bin": DATA}
        assert server.faults == []
        assert server.sent["/caches/faults/file.bin"] <= SIZE * MOST_SENT[name]


@pytest.fixture(params=["http", "s3"])
def faulty(request, server, monkeypatch):
    """A server, and what opens a place there, of either kind."""
    if request.param == "http":
        yield server, functools.partial(open_remote, f"{server.url}?key=secret", timeout=0.4)
        return
    with FaultyServer(upstream=request.getfixturevalue("s3")) as proxy:
        for variable, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(variable, value)
        open_remote("s3://caches/known").upload({"file.bin": server.root / "file.bin"})
        yield proxy, functools.partial(open_remote, "s3://caches/known", timeout=0.4)


@pytest.mark.slow(quick=("http",))
def test_every_fault_passes_if_it_may_and_else_ends_in_words_in_time(faulty, tmp_path):
    server, open_here = faulty
    patient, hasty = open_here(), open_here(attempts=1)
    for name, fault in KNOWN.items():
        here, there = tmp_path / name / "here", tmp_path / name / "there"
        server.faults, server.always = [fault], Fault()
        fetch(patient, here)
        assert tree(here) == {"file.bin": DATA}, name
        server.always = fault
        began, words = time.monotonic(), ""
        try:
            fetch(hasty, there)
        except TransferError as error:
            words = str(error)
        # A wrong length may do no harm; nothing else appears under the file's name.
        assert words or tree(there) == {"file.bin": DATA}, name
        assert not words or not (there / "file.bin").exists(), name
        assert "secret" not in words, name
        assert len(words) < 1000, name
        assert time.monotonic() - began < 2 * 0.4 + 10, name  # a head and a body


def test_news_before_an_answer_and_any_case_of_its_headers_are_no_faults(faulty, tmp_path):
    server, open_here = faulty
    remote = open_here(attempts=1)
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Encoding: Identity\r\n\r\nok"
    server.always = Fault(raw=b"HTTP/1.1 102 P\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + whole)
    assert remote.read("file.bin", max_bytes=9) == b"ok"


def test_a_small_file_may_take_so_long_and_costs_no_more_than_its_bytes(server, monkeypatch):
    remote = open_remote(server.url)
    endless = streams.Body(0, None, lambda _: b"x", lambda: None)
    monkeypatch.setattr(remote, "_open", lambda *_, **__: endless)
    monkeypatch.setattr(base, "_LONGEST_READ", 0.3)
    with pytest.raises(TransferError, match=r"manifest.json: only \d+ bytes arrived in 0 s; check the network"):
        remote.read("manifest.json", max_bytes=64 << 20)


@pytest.mark.parametrize(("fault", "words"), [
    (Fault(status=503), "answered 503"),
    (Fault(cut=0), "ended after 0 of 300000 bytes"),
    (Fault(extra=b"more"), "has 300004 bytes; expected 300000"),
])  # fmt: skip
def test_what_does_not_pass_ends_after_so_many_tries_in_an_error_that_says_what_to_do(
    server, tmp_path, fault, words, waits
):
    server.always = fault
    with pytest.raises(TransferError, match="run the same command again") as caught:
        fetch(open_remote(server.url, attempts=4), tmp_path / "here")
    for text in (f"{server.url}/file.bin", "failed 4 times", words):
        assert text in str(caught.value)
    assert len(server.requests) == 4
    assert len(waits) == 3
    assert not (tmp_path / "here" / "file.bin").exists()
    server.always = Fault()
    fetch(open_remote(server.url), tmp_path / "here")
    assert tree(tmp_path / "here") == {"file.bin": DATA}


def test_tries_that_bring_much_are_no_failures(tmp_path, monkeypatch, server):
    monkeypatch.setattr(streams, "_PROGRESS_BYTES", 20_000)
    server.always = Fault(cut=25_000)  # twelve times in all
    fetch(open_remote(server.url, attempts=2), tmp_path / "here")
    assert tree(tmp_path / "here") == {"file.bin": DATA}
    assert server.sent["/file.bin"] == SIZE


@pytest.mark.parametrize(("fault", "words"), [
    (Fault(status=401), "answered 401 Unauthorized; ask whoever owns it"),
    (Fault(status=403), "answered 403 Forbidden; ask whoever owns it"),
    (Fault(status=400), "answered 400 Bad Request; check the address"),
    *((fault, r"redirect from http to|redirected (more than 10 times|to what is no)") for fault in REDIRECTS.values()),
])  # fmt: skip
def test_what_will_not_pass_is_not_tried_again(server, tmp_path, fault, words, waits):
    server.always = fault
    with pytest.raises(TransferError, match=words) as caught:
        fetch(open_remote(f"{server.url}?key=secret"), tmp_path / "here")
    assert "secret" not in str(caught.value)
    assert waits == []


@pytest.fixture
def secure(tmp_path, monkeypatch, server):
    """A server whose certificate is its own, beside the plain one, and the certificate's file."""
    certificate, tls = own_certificate(tmp_path)
    http._opener.cache_clear()
    with FaultyServer(server.root, tls=tls) as secure:
        yield secure, certificate
    http._opener.cache_clear()


def test_a_server_that_nobody_vouches_for_is_not_trusted_until_told_to(secure, tmp_path, monkeypatch, waits):
    server, certificate = secure
    with pytest.raises(TransferError, match=r"certificate is not trusted: self.signed certificate.*SSL_CERT_FILE"):
        fetch(open_remote(server.url), tmp_path / "here")
    assert waits == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    http._opener.cache_clear()
    fetch(open_remote(server.url), tmp_path / "here")
    assert tree(tmp_path / "here") == {"file.bin": DATA}


def test_a_secure_address_does_not_lead_to_an_insecure_one(secure, server, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(secure[1]))
    secure[0].always = Fault(status=302, headers={"Location": f"{server.url}/file.bin"})
    with pytest.raises(TransferError, match="redirect from https to http"):
        fetch(open_remote(secure[0].url), tmp_path / "here")
    assert server.requests == []


def test_the_query_of_a_signed_address_is_sent_and_never_shown(server, tmp_path):
    fetch(open_remote(f"{server.url}?signature=secret"), tmp_path / "here")
    assert [path for _, path, _ in server.requests] == ["/file.bin?signature=secret"]
    server.always = Fault(status=403)
    with pytest.raises(TransferError) as caught:
        fetch(open_remote(f"{server.url}?signature=secret"), tmp_path / "there")
    assert "secret" not in str(caught.value)


def test_a_file_the_server_does_not_have_is_missing_there(server, tmp_path):
    server.always = Fault(status=404)
    words = "missing, although the cache's description lists it.*if it was pushed just now, run the same command again"
    with pytest.raises(TransferError, match=words):
        fetch(open_remote(server.url), tmp_path / "here")
    assert len(server.requests) == 4


def test_waits_double_and_stay_within_bounds_whatever_the_server_asks():
    longest = [max(streams.waiting_time(n, None) for _ in range(200)) for n in range(1, 12)]
    assert all(0.4 * 2**n < seconds <= 0.5 * 2**n for n, seconds in enumerate(longest[:6]))
    assert max(longest) <= 30
    assert streams.waiting_time(1, 5.0) == 5.0
    assert streams.waiting_time(1, 3000.0) == 120.0
    assert streams.waiting_time(1, 1e9) <= 0.5  # nonsense
    assert streams.waiting_time(1, -3.0) == 0.0
    assert http.retry_after("12") == 12.0
    assert 50 < http.retry_after(http.email.utils.formatdate(http.time.time() + 60, usegmt=True)) <= 60
    assert http.retry_after("soon") is http.retry_after("") is None


def test_a_file_that_changed_since_half_of_it_came_is_fetched_anew_once(server, tmp_path):
    server.always = Fault(cut=200_000)
    with pytest.raises(TransferError):
        fetch(open_remote(server.url, attempts=1), tmp_path / "here")
    server.always = Fault()
    assert tree(tmp_path / "here") == {".tmp-file.bin-fetch": DATA[:200_000]}
    server.sent.clear()
    other = DATA[::-1]
    (tmp_path / "root" / "file.bin").write_bytes(other)
    moved = fetch(open_remote(server.url), tmp_path / "here", data=other)
    assert tree(tmp_path / "here") == {"file.bin": other}
    assert moved.bytes == server.sent["/file.bin"] == SIZE - 200_000 + SIZE


def test_a_file_damaged_at_its_source_is_fetched_twice_and_never_appears(server, tmp_path):
    (tmp_path / "root" / "file.bin").write_bytes(b"\1" + DATA[1:])
    with pytest.raises(TransferError, match=r"damaged or changed: expected xxh3_128 \w+ and sha256 .*cachectl verify"):
        fetch(open_remote(server.url), tmp_path / "here")
    assert server.sent["/file.bin"] == 2 * SIZE
    assert not (tmp_path / "here" / "file.bin").exists()


@pytest.fixture
def served_cache(tmp_path):
    build_cache(tmp_path / "root" / "cache", make_plan("webdataset"))
    (tmp_path / "root" / "cache" / "README.md").write_text("# A card\n")
    with FaultyServer(tmp_path / "root") as server:
        yield server


def test_a_manifest_that_came_in_part_is_read_again(served_cache, tmp_path):
    served_cache.faults = [Fault(old=True, cut=300), KNOWN["another page"]]
    pull(f"{served_cache.url}/cache", tmp_path / "here", jobs=1)
    assert tree(tmp_path / "here") == tree(tmp_path / "root" / "cache")


def test_a_card_that_is_not_there_for_a_moment_is_asked_for_again(served_cache, tmp_path):
    served_cache.concerns = lambda method, path: path.endswith("README.md")
    served_cache.faults = [KNOWN["not there yet"]]
    pull(f"{served_cache.url}/cache", tmp_path / "here", jobs=1)
    assert tree(tmp_path / "here") == tree(tmp_path / "root" / "cache")


def test_a_file_that_cannot_be_opened_here_is_called_by_its_final_name(served_cache, tmp_path, monkeypatch):
    def refuse(path, **_):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(fetch_module, "lock", refuse)
    with pytest.raises(OSError, match="Too many open files") as caught:
        pull(f"{served_cache.url}/cache", tmp_path / "here", jobs=1)
    assert caught.value.filename in map(str, (tmp_path / "here" / name for name in tree(tmp_path / "root" / "cache")))


def test_an_address_shows_neither_password_nor_signature():
    error = ValueError("no answer from 'https://me:word@host/a?X-Sig=abc&b=c', or http://h/b?k=v; is it up? yes=no")
    assert streams.said(error) == ("no answer from 'https://host/a?...', or http://h/b?...; is it up? yes=no")


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_whole_cache_arrives_from_a_server_that_fails_all_the_time(served_cache, tmp_path, every):
    kinds = [Fault(cut=700), Fault(status=503), Fault(whole=True), Fault(), Fault(cut=0), Fault(flip=True)]
    served_cache.faults = [kinds[i * every % len(kinds)] for i in range(30)]
    served_cache.concerns = lambda _, path: not path.endswith("README.md")  # for people: no digest covers it
    while True:
        try:
            pull(f"{served_cache.url}/cache", tmp_path / "here", jobs=3)
            break
        except (TransferError, CacheFormatError):  # a manifest with a changed bit is no manifest
            assert not (tmp_path / "here" / "manifest.json").exists()
    assert tree(tmp_path / "here") == tree(tmp_path / "root" / "cache")


def test_a_pull_that_failed_for_good_goes_on_later_and_fetches_only_the_rest(served_cache, tmp_path):
    expected = tree(tmp_path / "root" / "cache")
    served_cache.concerns = lambda _, path: path.endswith("00001.tar")
    served_cache.always = Fault(cut=0)
    served_cache.faults = [Fault(cut=4_000)]
    with pytest.raises(TransferError, match=r"00001\.tar: failed 5 times"):
        pull(f"{served_cache.url}/cache", tmp_path / "here", jobs=1)
    assert not (tmp_path / "here" / "manifest.json").exists()
    served_cache.always = Fault()
    pull(f"{served_cache.url}/cache", tmp_path / "here", jobs=1)
    assert tree(tmp_path / "here") == expected
    sent = {path.removeprefix("/cache/"): size for path, size in served_cache.sent.items()}
    assert sent.pop("manifest.json") == 2 * len(expected["manifest.json"])
    assert sent == {name: len(data) for name, data in expected.items() if name != "manifest.json"}


def test_a_push_through_a_failing_network_is_complete_in_the_end(served_cache, s3, tmp_path, monkeypatch):
    import botocore.retries.standard
    import botocore.retryhandler

    for module in (botocore.retries.standard, botocore.retryhandler):
        monkeypatch.setattr(module, "time", type("NoTime", (), {"sleep": staticmethod(lambda _: None)}), raising=False)
    with FaultyServer(upstream=s3) as server:
        for variable, value in s3_environment(server.url).items():
            monkeypatch.setenv(variable, value)
        server.concerns = lambda method, path: True
        server.faults = [Fault(status=503), Fault(cut=0), Fault(), Fault(status=500)] * 4
        push(tmp_path / "root" / "cache", "s3://caches/pushed", jobs=1)  # one request gets four faults at most
        monkeypatch.setattr(
            vlm_distill_cache.common.remotes.pull, "open_remote", functools.partial(open_remote, attempts=1)
        )
        pull("s3://caches/pushed", tmp_path / "here")
    assert tree(tmp_path / "here") == tree(tmp_path / "root" / "cache")


def test_a_thread_whose_work_is_not_wanted_any_more_stops_waiting(monkeypatch):
    monkeypatch.setattr(streams, "wait", WAIT)
    stop, seen = threading.Event(), []

    def work() -> None:
        streams.stop_waiting_on(stop)
        try:
            streams.wait(3600)
        except streams.StoppedError as error:
            seen.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    stop.set()
    thread.join(30)
    assert len(seen) == 1


def test_the_first_error_ends_all_and_is_the_one_raised(server, tmp_path):
    server.concerns = lambda _, path: path == "/file.bin"
    server.always = Fault(status=403)
    files = {"file.bin": FileEntry.of_bytes(DATA)}
    for number in range(40):
        (server.root / f"{number}").write_bytes(DATA)
        files[f"{number}"] = FileEntry.of_bytes(DATA)
    with pytest.raises(TransferError, match="403"):
        fetch_files(open_remote(server.url), tmp_path / "here", files, jobs=2)
    assert len(server.requests) < 41

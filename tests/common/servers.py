"""Real servers that tests start: an S3 store (moto), nginx, and one of ours that fails on command."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

Answer = tuple[int, dict[str, str], bytes]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer. Without arguments nothing does."""

    status: int | None = None  # answer this, and do nothing
    body: bytes = b""  # with this body
    headers: dict[str, str] = field(default_factory=dict)  # added, or instead
    cut: int | None = None  # close the connection after so many bytes of the body
    stall: int | None = None  # send so many bytes, then nothing, until the client leaves
    trickle: bool = False  # a byte every few milliseconds, for as long as the client listens
    whole: bool = False  # do not understand ranges
    unconditional: bool = False  # nor conditions
    chunked: bool = False  # do not say how long the body is
    extra: bytes = b""  # send this after the body
    flip: bool = False  # change a bit in the middle
    hang: bool = False  # do not even answer, and do nothing
    raw: bytes | None = None  # send this instead of an answer
    cut_head: int | None = None  # close the connection after so many bytes of the headers
    drip_head: bool = False  # a byte of the headers every 50 ms
    endless: bytes = b""  # after the answer, this again and again until the client leaves
    old: bool = False  # HTTP/1.0: the body has no length, and ends with the connection


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>Please wait</Message></Error>".encode()


_OK = b"HTTP/1.1 200 OK\r\n"
# Every kind of fault that may pass, for tests that try them all.
FAULTS = {
    "busy": Fault(status=503),
    "slow down": Fault(status=503, body=_error("SlowDown"), headers={"Retry-After": "1"}),
    "internal": Fault(status=500, body=_error("InternalError")),
    "wait for ever": Fault(status=429, headers={"Retry-After": "9" * 5000}),
    "wait till then": Fault(status=429, headers={"Retry-After": "Mon, 99 Foo 99999 99:99:99 -9999"}),
    "not there yet": Fault(status=404, body=_error("NoSuchKey")),
    "deep error": Fault(status=503, body=b"<Error>" + b"<a>" * 2000 + b"</a>" * 2000 + b"</Error>"),
    "two codes": Fault(status=500, body=b"<Error><Code>a</Code><Code>b</Code></Error>"),
    "checksum of an absence": Fault(status=404, body=_error("NoSuchKey"), headers={"x-amz-checksum-crc32": "AAAAAA=="}),
    "error cut": Fault(status=500, body=_error("InternalError"), cut=30),
    "error cut inside the XML": Fault(status=500, body=_error("InternalError")[:40]),
    "absence cut": Fault(status=404, body=_error("NoSuchKey"), cut=30),
    "error of the proxy's": Fault(status=502, body=b"<html><p>bad gateway"),
    "endless error": Fault(status=500, endless=b"x" * 65536, headers={"Content-Length": "9" * 15}),
    "endless chunked error": Fault(status=500, endless=b"10000\r\n" + b"x" * 65536 + b"\r\n",
                                   headers={"Transfer-Encoding": "chunked"}, chunked=True),
    "nothing": Fault(raw=b""),
    "no HTTP": Fault(raw=b"SSH-2.0-OpenSSH_9.6\r\n"),
    "status cut": Fault(cut_head=7),
    "headers cut": Fault(cut_head=60),
    "headers drip": Fault(drip_head=True),
    "endless headers": Fault(raw=_OK, endless=b"X-Pad: " + b"x" * 900 + b"\r\n"),
    "endless line": Fault(raw=_OK + b"X-Pad: ", endless=b"x" * 65536),
    "endless interim answers": Fault(raw=b"", endless=b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "no answer": Fault(hang=True),
    "cut before the body": Fault(cut=0),
    "cut": Fault(cut=1000),
    "cut without a length": Fault(old=True, cut=1000),
    "stalled": Fault(stall=1000),
    "trickle": Fault(trickle=True),
    "longer than it is": Fault(extra=b"x" * 5000),
    "length too long": Fault(headers={"Content-Length": "99999999"}),
    "length too short": Fault(headers={"Content-Length": "10"}),
    "length of 5,000 digits": Fault(headers={"Content-Length": "9" * 5000}),
    "length that is none": Fault(headers={"Content-Length": "-7 bytes"}),
    "chunks cut": Fault(raw=_OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"),
    "chunks that are none": Fault(raw=_OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nab"),
    "endless chunk line": Fault(raw=_OK + b"Transfer-Encoding: chunked\r\n\r\n", endless=b"0" * 65536),
    "endless trailers": Fault(raw=_OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", endless=b"X: y\r\n" * 9999),
    "endless body": Fault(raw=_OK + b"\r\n", endless=b"x" * 65536),
    "flipped": Fault(flip=True),
    "another page": Fault(raw=_OK + b"Content-Length: 13\r\n\r\n<html></html>"),
    "part of what was not asked for": Fault(status=206, body=b"x", headers={"Content-Range": "bytes 7-7/9"}),
    "range of 5,000 digits": Fault(status=206, body=b"x", headers={"Content-Range": f"bytes 0-0/{'9' * 5000}"}),
    "nothing at all": Fault(status=204),
}  # fmt: skip
# And those that are refused at once.
REDIRECTS = {
    location: Fault(status=302, headers={"Location": location})
    for location in (
        "ftp://127.0.0.1/f", "ftp:", "file:///etc/passwd", "gopher://127.0.0.1/", "data:text/plain,x", "http://[half",
        "javascript:x", "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://user:secret@127.0.0.1/", "https:", "//",
        "http://%01/", "http://a b/", "/file.bin", "", "?", "http:file.bin", "\x85\xff",
    )
}  # fmt: skip


class Http(ThreadingHTTPServer):
    """A server whose threads are waited for."""

    daemon_threads = False
    request_queue_size = 128  # with 5, the library's number, some of many threads at once are let in a second later


class FaultyServer:
    """Serves a folder, with ranges, or passes on to another server, as its ``faults`` say.

    Attributes:
        faults: Taken one a request, by those requests that ``concerns`` picks; when none are left, all is well.
        always: The fault of every such request thereafter.
        requests: ``(method, path, range)`` of every request.
        sent: Bytes of bodies sent, by path.
        secrets: The ``Authorization`` of every request, or None.
    """

    def __init__(
        self, root: Path | None = None, upstream: str | None = None, *, tls: ssl.SSLContext | None = None
    ) -> None:
        self.root, self.upstream = root, upstream
        self.faults: list[Fault] = []
        self.always = Fault()
        self.concerns: Callable[[str, str], bool] = lambda method, path: method == "GET"
        self.requests: list[tuple[str, str, str]] = []
        self.sent: dict[str, int] = {}
        self.secrets: list[str | None] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = Http(("127.0.0.1", 0), self._handler())
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()  # waits for the threads of its answers

    def take(self, method: str, path: str, wanted: str) -> Fault:
        with self._lock:
            self.requests.append((method, path, wanted))
            if not self.concerns(method, path):
                return Fault()
            return self.faults.pop(0) if self.faults else self.always

    def count(self, path: str, size: int) -> None:
        with self._lock:
            self.sent[path] = self.sent.get(path, 0) + size

    def answer(self, handler: BaseHTTPRequestHandler, fault: Fault) -> Answer:
        if self.upstream is not None:
            return self._pass_on(handler, fault)
        path = self.root / unquote(urlsplit(handler.path).path).lstrip("/")
        if not path.is_file():
            return 404, {}, b"not here"
        data = path.read_bytes()
        wanted = handler.headers.get("Range")
        if wanted is None or fault.whole:
            return 200, {}, data
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        return 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]

    def _pass_on(self, handler: BaseHTTPRequestHandler, fault: Fault) -> Answer:
        unknown = ("Range",) * fault.whole + ("If-Match", "If-None-Match") * fault.unconditional
        headers = {k: v for k, v in handler.headers.items() if k not in unknown}
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=10)
        with contextlib.closing(connection):
            connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            skipped = ("content-length", "transfer-encoding", "connection", "date", "server")
            found = {k: v for k, v in response.getheaders() if k.lower() not in skipped}
            if handler.command == "HEAD":
                found["Content-Length"] = response.headers.get("Content-Length", "0")
            return response.status, found, response.read()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                server.secrets.append(self.headers.get("Authorization"))
                fault = server.take(self.command, self.path, self.headers.get("Range", ""))
                if fault.hang:
                    server.closing.wait(30)
                    self.close_connection = True
                    return
                if fault.status is not None:
                    self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    status, headers, body = fault.status, {}, fault.body
                else:
                    status, headers, body = server.answer(self, fault)
                if fault.flip and body:
                    middle = len(body) // 2
                    body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
                headers |= fault.headers
                body += fault.extra
                if fault.raw is not None:
                    headers, body = {}, fault.raw
                self.protocol_version = "HTTP/1.0" if fault.old else "HTTP/1.1"
                self.send_response(status)
                if not (fault.chunked or fault.old) and "Content-Length" not in headers:
                    headers["Content-Length"] = str(len(body))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Connection", "close")
                head = b"".join(self._headers_buffer) + b"\r\n"
                self._headers_buffer = []
                self.close_connection = True
                with contextlib.suppress(OSError):  # the client may leave early
                    if fault.raw is None:
                        self.send_head(head[: fault.cut_head], 1 if fault.drip_head else len(head))
                    if fault.cut_head is None and self.command != "HEAD":
                        self.send_body(body, fault)
                    while fault.endless and not server.closing.is_set():
                        self.wfile.write(fault.endless)

            def send_head(self, head: bytes, step: int) -> None:
                for start in range(0, len(head), step):
                    self.wfile.write(head[start : start + step])
                    if step == 1 and server.closing.wait(0.05):
                        return

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one  # noqa: N815

            def send_body(self, body: bytes, fault: Fault) -> None:
                stop = min(n for n in (fault.cut, fault.stall, len(body)) if n is not None)
                step = 1 if fault.trickle else max(stop, 1)
                for start in range(0, stop, step):
                    server.count(self.path, len(body[start : start + step]))  # first: a client may be done at once
                    self.wfile.write(body[start : start + step])
                    self.wfile.flush()
                    if fault.trickle and server.closing.wait(0.005):
                        return
                if fault.stall is not None:
                    self.connection.settimeout(10)
                    with contextlib.suppress(OSError):
                        self.connection.recv(1)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def own_certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """Make a certificate for 127.0.0.1 that no authority signed; returns its file and a server's settings."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1)
        )
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    place, secret = folder / "certificate.pem", folder / "key.pem"
    place.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ))  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place, secret)
    return place, context


@contextlib.contextmanager
def serve_s3(bucket: str = "caches") -> Iterator[str]:
    """Run an S3 server with one empty bucket; yields its address. Set ``s3_environment`` to use it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # moto's own, on import
        from moto.server import ThreadedMotoServer
    import botocore.session

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    # Reading the service's description takes most of the time to make a client.
    loader = botocore.session.create_loader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", lambda _path=None: loader)
        try:
            host, port = server.get_host_and_port()
            url = f"http://{host}:{port}"
            s3_client(url).create_bucket(Bucket=bucket)
            yield url
        finally:
            server.stop()


def s3_environment(url: str) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip


def s3_client(url: str):
    import boto3

    return boto3.session.Session().client(
        "s3",
        endpoint_url=url,
        aws_access_key_id="tests",
        aws_secret_access_key="tests",
        region_name="us-east-1",
    )


@contextlib.contextmanager
def serve_nginx(root: Path, work: Path) -> Iterator[str]:
    """Run nginx as this user on a folder; yields its address."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/bin")
    if program is None:
        pytest.skip("nginx is not installed")
    work.mkdir(parents=True, exist_ok=True)
    places = "".join(
        f"  {kind}_temp_path {work}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    for _ in range(5):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (work / "nginx.conf").write_text(
            f"daemon off;\nmaster_process off;\npid {work}/pid;\nerror_log {work}/error.log;\n"
            f"events {{}}\nhttp {{\n  access_log {work}/access.log;\n{places}"
            f"  server {{\n    listen 127.0.0.1:{port};\n    root {root};\n  }}\n}}\n"
        )
        process = subprocess.Popen([program, "-e", str(work / "error.log"), "-c", str(work / "nginx.conf")])
        try:
            if _answers(process, port):
                yield f"http://127.0.0.1:{port}"
                return
        finally:
            process.terminate()
            process.wait()
    pytest.fail(f"nginx did not start: {(work / 'error.log').read_text()}")


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until a server listens; False if it ended, say because another process was quicker to take the port."""
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            time.sleep(0.01)
            return process.poll() is None
        time.sleep(0.01)
    return False

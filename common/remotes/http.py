"""Files behind a web server, to read: any that serves a folder will do, best one that knows ranges.

Built on ``urllib``: it takes proxies and certificates from the environment as everything else does
(``HTTPS_PROXY``, ``NO_PROXY``, ``SSL_CERT_FILE``), and needs no version of any library.
"""

from __future__ import annotations

import email.utils
import functools
import http.client
import re
import ssl
import string
import time
import urllib.request
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.client import HTTPException, HTTPMessage
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit

from vlm_distill_cache.common.errors import ConfigError, TransferError
from vlm_distill_cache.common.locations import public_location
from vlm_distill_cache.common.remotes.answers import LimitedResponse
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.streams import Body, PassingError, RangeRefusedError, Retries

MAY_PASS = (408, 425, 429, 500, 502, 503, 504)
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_HOST = re.compile(r"[\w.:-]+", re.ASCII)
_LENGTH = re.compile(r"[0-9]{1,18}")
_MOST_REDIRECTS = 10


class WebRemote(Remote):
    """A folder whose files are read with plain ranged HTTP; a subclass knows their addresses, and how to write.

    Attributes:
        no_access: What to do if the server refuses, for the error.
    """

    no_access = "ask whoever owns it for access"

    @abstractmethod
    def _url(self, name: str) -> str: ...

    def _headers(self) -> Mapping[str, str]:
        """What to send to the file's host, and to no other that it redirects to."""
        return {}

    def _open(self, name: str, start: int = 0, stop: int | None = None) -> Body:
        where = self._where(name)
        request = _Request(self._url(name), until=time.monotonic() + self._retries.timeout)
        for header, value in self._headers().items():
            request.add_unredirected_header(header, value)
        if start or stop is not None:
            request.add_header("Range", f"bytes={start}-{stop - 1 if stop is not None else ''}")
        with self._failures(where):
            try:
                response: LimitedResponse = _opener().open(request, timeout=self._retries.timeout)
            except HTTPError as error:
                if error.code != 416 or (error.headers.get("Content-Range") or "").strip() != "bytes */0":
                    raise
                return Body(0, 0, lambda _: b"", error.close)

        def read(limit: int) -> bytes:
            with self._failures(where):
                response.allow(limit)
                return response.read1(limit)  # unlike read(), does not wait until all of it is there

        with ExitStack() as unless_handed_on:
            unless_handed_on.callback(response.close)
            start, total = _position(response, start)
            unless_handed_on.pop_all()
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        return Body(start, total, read, response.close, version[:200])

    @contextmanager
    def _failures(self, where: str) -> Iterator[None]:
        """Sort the library's errors into absent, transient and permanent."""
        try:
            yield
        except HTTPError as error:
            with error:
                raise self._failure(where, error) from error
        except (OSError, HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, URLError) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise TransferError(
                    f"{where}: the server's certificate is not trusted: {cause.verify_message}; if it is "
                    "your own server, name its authority in SSL_CERT_FILE"
                ) from error
            raise PassingError(_words(cause)) from error
        except _RedirectError as error:
            raise TransferError(f"{where}: {error}; check the address, or ask whoever runs the server") from error

    def _failure(self, where: str, error: HTTPError) -> Exception:
        phrase = http.client.responses.get(error.code, "")  # ours: the server's own words may be anything
        said = f"answered {error.code} {phrase}".rstrip()
        if error.code in (404, 410):
            return FileNotFoundError(2, "no such file", where)
        if error.code == 416:
            return RangeRefusedError(said)
        if error.code in MAY_PASS:
            return PassingError(said, retry_after=retry_after(error.headers.get("Retry-After", "")))
        return TransferError(
            f"{where}: {said}; {self.no_access if error.code in (401, 403, 407) else 'check the address'}"
        )


class HttpRemote(WebRemote):
    """A folder on a web server, to read; a query (a signed address) is sent with every request and shown to nobody."""

    def __init__(self, location: str, retries: Retries) -> None:
        try:
            parts = urlsplit(location)
            known = parts.port != 0 and parts.hostname is not None and parts.hostname.isascii()
        except ValueError:
            known = False
        if not known or " " in location or parts.fragment or not location.isprintable():
            raise ConfigError(
                f"{public_location(location)}: not an address; expected http(s)://HOST/FOLDER, with blanks as %20, # as %23 and "
                "the host's name in ASCII"
            )
        if parts.username or parts.password:
            raise ConfigError(f"{parts.scheme}://{parts.hostname}: a password in the address ends up in logs; "
                              "use a signed address or a server that this machine may read")  # fmt: skip
        path = quote(parts.path, safe=string.punctuation)  # spells out letters beyond ASCII, and nothing else
        super().__init__(parts._replace(path=path, query="").geturl().rstrip("/"), retries)
        self._query = f"?{quote(parts.query, safe=string.punctuation)}" if parts.query else ""

    def _where(self, name: str) -> str:
        return f"{self.location}/{quote(name)}"

    def _url(self, name: str) -> str:
        return self._where(name) + self._query


def _position(response: LimitedResponse, start: int) -> tuple[int, int | None]:
    """Return where in the file a response begins, and the bytes of the file if it says so."""
    if (encoding := response.headers.get("Content-Encoding", "").strip()).lower() not in ("", "identity"):
        raise PassingError(f"sent as {encoding[:40]}, unasked: a server of caches sends files as they are")
    if response.status == 206:
        found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != start:
            found_range = response.headers.get("Content-Range", "")[:80]
            raise PassingError(f"asked for bytes from {start}, the answer says {found_range!r}")
        return start, None if found[3] == "*" else int(found[3])
    if response.status != 200:
        raise PassingError(f"answered {response.status}, which is no file")
    length = response.headers.get("Content-Length", "").strip()
    return 0, int(length) if _LENGTH.fullmatch(length) else None


def _words(cause: object) -> str:
    """What failed, in words of our own: those of the libraries may quote an address, and whatever a server says."""
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    if isinstance(cause, ValueError):
        return "the host's name cannot be looked up"
    if isinstance(cause, HTTPException):
        return f"the answer broke off, or is no HTTP ({type(cause).__name__})"
    if isinstance(cause, ConnectionError) and cause.args and isinstance(cause.args[0], str):
        return cause.args[0]
    return str(getattr(cause, "strerror", None) or type(cause).__name__)


def retry_after(text: str) -> float | None:
    """Read ``Retry-After``: seconds, or a date, or nothing."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError, LookupError, OverflowError):
        return None


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Connections(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "cachectl")]
    return opener


class _Request(urllib.request.Request):
    """A request that knows when its answer must be there, and how often it has been sent elsewhere."""

    def __init__(self, url: str, *, until: float, hops: int = 0) -> None:
        super().__init__(url)
        self.until, self.hops = until, hops


class _Plain(http.client.HTTPConnection):
    response_class = LimitedResponse


class _Secure(http.client.HTTPSConnection):
    response_class = LimitedResponse


class _Connections(urllib.request.AbstractHTTPHandler):
    def __init__(self) -> None:
        super().__init__()
        self._trusted = ssl.create_default_context()  # once: reading all certificates is slow

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Plain, request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Secure, request, context=self._trusted)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


class _RedirectError(Exception):
    """A redirect that is not followed."""


class _Redirects(urllib.request.BaseHandler):
    """Follows redirects, at most ten; keeps secrets on their host and never leaves https, or http for anything else."""

    def http_error_302(self, request: _Request, answer: Any, code: int, reason: str, headers: HTTPMessage) -> Any:
        location = headers.get("Location")
        if location is None:
            return None
        answer.close()
        if request.hops >= _MOST_REDIRECTS:
            raise _RedirectError(f"redirected more than {_MOST_REDIRECTS} times")
        old, url = urlsplit(request.full_url), _redirect(request.full_url, location)
        again = _Request(url, until=request.until, hops=request.hops + 1)
        for name in request.headers.keys() & {"Range"}:
            again.add_header(name, request.headers[name])
        if (old.scheme, old.netloc) == urlsplit(url)[:2]:
            for name, value in request.unredirected_hdrs.items():
                if name != "Host":
                    again.add_unredirected_header(name, value)
        left = request.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return self.parent.open(again, timeout=left)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _redirect(old: str, location: str) -> str:
    """Return where a redirect leads to, or refuse it."""
    try:
        new = urlsplit(urljoin(old, quote(location, encoding="iso-8859-1", safe=string.punctuation)))
        whole = new.port != 0 and _HOST.fullmatch(new.hostname or "") and new.geturl().isprintable()
    except ValueError:
        raise _RedirectError("redirected to what is no address") from None
    if new.scheme not in ((scheme := urlsplit(old).scheme), "https"):
        raise _RedirectError(f"redirect from {scheme} to {new.scheme[:20]}, which is not followed")
    if not whole or new.username is not None or new.password is not None:
        raise _RedirectError("redirected to what is no address")
    return new.geturl()

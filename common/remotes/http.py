"""Files behind a web server, to read: any that serves a folder will do, best one that knows ranges.

Built on ``urllib``: it takes proxies and certificates from the environment as everything else does
(``HTTPS_PROXY``, ``NO_PROXY``, ``SSL_CERT_FILE``), and needs no version of any library.
"""

from __future__ import annotations

import email.utils
import functools
import re
import ssl
import string
import time
import urllib.request
from contextlib import ExitStack
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

from vlm_distill_cache.common.errors import ConfigError, TransferError
from vlm_distill_cache.common.remotes.streams import PassingError, RangeRefusedError, Retries, download_file, read_small

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from http.client import HTTPMessage, HTTPResponse
    from pathlib import Path
    from typing import IO

_MAY_PASS = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
NO_ACCESS = "ask whoever owns it for access"
_PULL_ONLY = "to write, use a folder, s3://BUCKET/PREFIX or hf://datasets/ORG/NAME"


class HttpRemote:
    """A folder on a web server; pull only.

    Args:
        location: ``http(s)://HOST/FOLDER``. A query (a signed address) is sent with every request and
            shown to nobody.
        retries: How patient to be.
    """

    upload_files = 1
    upload_jobs = 1

    def __init__(self, location: str, retries: Retries) -> None:
        try:
            parts = urlsplit(location)
            known = parts.port != 0 and parts.hostname is not None and parts.hostname.isascii()
        except ValueError:
            known = False
        if not known or " " in location or parts.fragment or not location.isprintable():
            raise ConfigError(
                f"{location}: not an address; expected http(s)://HOST/FOLDER, with blanks as %20, # as %23 and "
                "the host's name in ASCII"
            )
        if parts.username or parts.password:
            raise ConfigError(f"{parts.scheme}://{parts.hostname}: a password in the address ends up in logs; "
                              "use a signed address or a server that this machine may read")  # fmt: skip
        path = quote(parts.path, safe=string.punctuation)  # spells out letters beyond ASCII, and nothing else
        self.location = parts._replace(path=path, query="").geturl().rstrip("/")
        self._query = f"?{quote(parts.query, safe=string.punctuation)}" if parts.query else ""
        self._retries = retries

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Return a small file whole; see ``Remote``."""
        where, url = self._address(name)
        return read_small(lambda: self._open(where, url), where, max_bytes=max_bytes, retries=self._retries)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None; see ``Remote``."""
        where, url = self._address(name)
        return http_size(where, url, {}, self._retries)

    def download(self, name: str, target: Path, *, size: int, on_bytes: Callable[[int], object] | None = None) -> None:
        """Append what is missing to ``target``; see ``Remote``."""
        where, url = self._address(name)

        def open_at(start: int) -> HttpBody:
            return self._open(where, url, start)

        download_file(open_at, where, target, size=size, retries=self._retries, on_bytes=on_bytes)

    def upload(self, files: Mapping[str, Path], *, on_bytes: Callable[[int], object] | None = None) -> None:
        """Refuse: a web server is read only; see ``Remote``."""
        raise TransferError(f"{self.location}: pull only; {_PULL_ONLY}")

    def create(self, name: str, data: bytes) -> bool:
        """Refuse: a web server is read only; see ``Remote``."""
        raise TransferError(f"{self.location}: pull only; {_PULL_ONLY}")

    def delete(self, names: Iterable[str]) -> None:
        """Refuse: a web server is read only; see ``Remote``."""
        raise TransferError(f"{self.location}: pull only; {_PULL_ONLY}")

    def _address(self, name: str) -> tuple[str, str]:
        where = f"{self.location}/{quote(name)}"
        return where, where + self._query

    def _open(self, where: str, url: str, start: int = 0) -> HttpBody:
        return open_http(where, url, {}, timeout=self._retries.timeout, start=start)


class HttpBody:
    """A response that is arriving; see ``streams.Body``."""

    def __init__(self, response: HTTPResponse | None, start: int, total: int | None) -> None:
        self._response, self.start, self.total = response, start, total

    def read(self, limit: int) -> bytes:
        """Return what has arrived, at most ``limit`` bytes."""
        if self._response is None:
            return b""
        try:
            return self._response.read1(limit)  # unlike read(), does not wait until all of it is there
        except (OSError, HTTPException) as error:
            raise PassingError(_reason(error)) from error

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()


def http_size(
    where: str, url: str, headers: Mapping[str, str], retries: Retries, *, no_access: str = NO_ACCESS
) -> int | None:
    """Return the bytes of a file, or None if absent; asks for its first byte, as signed addresses allow GET only.

    Args:
        where: The address, for errors.
        url: The address.
        headers: To send to its host, and to no other that it redirects to.
        retries: How patient to be.
        no_access: What to do if the server refuses, for the error.

    Raises:
        TransferError: If the server does not say.
    """

    def attempt() -> int | None:
        try:
            body = open_http(where, url, headers, timeout=retries.timeout, stop=1, no_access=no_access)
        except FileNotFoundError:
            return None
        body.close()
        if body.total is None:
            raise TransferError(f"{where}: the server does not say how large the file is; use another server")
        return body.total

    return retries.run(where, attempt)


def open_http(
    where: str,
    url: str,
    headers: Mapping[str, str],
    *,
    timeout: float,
    start: int = 0,
    stop: int | None = None,
    no_access: str = NO_ACCESS,
) -> HttpBody:
    """Request a file, or a range of it.

    Args:
        where: The address, for errors.
        url: The address.
        headers: To send to its host, and to no other that it redirects to.
        timeout: Seconds to wait for each piece of the answer.
        start: First byte wanted.
        stop: End of the range; None for the end of the file.
        no_access: What to do if the server refuses, for the error.

    Raises:
        PassingError: For what may pass.
        FileNotFoundError: If it is absent.
        TransferError: For what will not pass.
    """
    request = urllib.request.Request(url)
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    if start or stop is not None:
        request.add_header("Range", f"bytes={start}-{stop - 1 if stop is not None else ''}")
    try:
        response = _opener().open(request, timeout=timeout)
    except HTTPError as error:
        with error:
            if error.code == 416 and (error.headers.get("Content-Range") or "").strip() == "bytes */0":
                return HttpBody(None, 0, 0)
            raise _http_failure(where, error, no_access) from error
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise TransferError(
                f"{where}: the server's certificate is not trusted: {error.reason.verify_message}; if it is "
                "your own server, name its authority in SSL_CERT_FILE"
            ) from error
        raise PassingError(_reason(error)) from error
    except (OSError, HTTPException) as error:
        raise PassingError(_reason(error)) from error
    except ValueError as error:  # the library's word for a redirect that it cannot read
        raise TransferError(f"{where}: redirected to what is no address ({error})") from error
    with ExitStack() as unless_handed_on:
        unless_handed_on.callback(response.close)
        body = _body(where, response, start)
        unless_handed_on.pop_all()
    return body


def _body(where: str, response: HTTPResponse, start: int) -> HttpBody:
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise TransferError(f"{where}: sent as {encoding}, unasked; serve the files of a cache as they are")
    if response.status == 206:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != start:
            said = response.headers.get("Content-Range")
            raise PassingError(f"asked for bytes from {start}, the answer says {said!r}")
        return HttpBody(response, start, None if found[3] == "*" else int(found[3]))
    if response.status != 200:
        raise PassingError(f"answered {response.status} {response.reason}")
    length = response.headers.get("Content-Length", "")
    return HttpBody(response, 0, int(length) if length.isdecimal() else None)


def _http_failure(where: str, error: HTTPError, no_access: str) -> Exception:
    said = f"answered {error.code} {error.reason}"
    if error.code in (404, 410):
        return FileNotFoundError(2, "no such file", where)
    if error.code == 416:
        return RangeRefusedError(said)
    if error.code in _MAY_PASS:
        return PassingError(said, retry_after=_retry_after(error.headers.get("Retry-After")))
    if error.code in (401, 403, 407):
        return TransferError(f"{where}: {said}; {no_access}")
    return TransferError(f"{where}: {said}; check the address")


def _retry_after(text: str | None) -> float | None:
    """Read ``Retry-After``: seconds, or a date."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError):
        return None


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # not build_opener: that would follow to ftp: and file: too
    opener.addheaders = [("User-Agent", "cachectl")]
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, at most ten; keeps secrets on their host and never leaves https for http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> Any:
        """Return the next request."""
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if old.scheme == "https" and new.scheme != "https":
            raise HTTPError(req.full_url, code, f"redirect from https to {new.scheme}", headers, fp)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            for name, value in req.unredirected_hdrs.items():
                if name != "Host":
                    request.add_unredirected_header(name, value)
        return request

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
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

from vlm_distill_cache.common.errors import ConfigError, TransferError
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.streams import Body, PassingError, RangeRefusedError, Retries

MAY_PASS = (408, 425, 429, 500, 502, 503, 504)
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


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
        where, request = self._where(name), urllib.request.Request(self._url(name))
        for header, value in self._headers().items():
            request.add_unredirected_header(header, value)
        if start or stop is not None:
            request.add_header("Range", f"bytes={start}-{stop - 1 if stop is not None else ''}")
        with self._failures(where):
            try:
                response: HTTPResponse = _opener().open(request, timeout=self._retries.timeout)
            except HTTPError as error:
                if error.code != 416 or (error.headers.get("Content-Range") or "").strip() != "bytes */0":
                    raise
                return Body(0, 0, lambda _: b"", error.close)

        def read(limit: int) -> bytes:
            with self._failures(where):
                return response.read1(limit)  # unlike read(), does not wait until all of it is there

        with ExitStack() as unless_handed_on:
            unless_handed_on.callback(response.close)
            start, total = _position(where, response, start)
            unless_handed_on.pop_all()
        return Body(start, total, read, response.close)

    @contextmanager
    def _failures(self, where: str) -> Iterator[None]:
        """Sort the library's errors into absent, transient and permanent."""
        try:
            yield
        except HTTPError as error:
            with error:
                raise self._failure(where, error) from error
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, URLError) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise TransferError(
                    f"{where}: the server's certificate is not trusted: {cause.verify_message}; if it is "
                    "your own server, name its authority in SSL_CERT_FILE"
                ) from error
            said = "no answer in time" if isinstance(cause, TimeoutError) else getattr(cause, "strerror", None)
            raise PassingError(said or str(cause) or type(cause).__name__) from error
        except ValueError as error:  # the library's word for a redirect that it cannot read
            raise TransferError(f"{where}: redirected to what is no address ({error})") from error

    def _failure(self, where: str, error: HTTPError) -> Exception:
        said = f"answered {error.code} {error.reason}"
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
                f"{location}: not an address; expected http(s)://HOST/FOLDER, with blanks as %20, # as %23 and "
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


def _position(where: str, response: HTTPResponse, start: int) -> tuple[int, int | None]:
    """Return where in the file a response begins, and the bytes of the file if it says so."""
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise TransferError(f"{where}: sent as {encoding}, unasked; serve the files of a cache as they are")
    if response.status == 206:
        found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != start:
            said = response.headers.get("Content-Range")
            raise PassingError(f"asked for bytes from {start}, the answer says {said!r}")
        return start, None if found[3] == "*" else int(found[3])
    if response.status != 200:
        raise PassingError(f"answered {response.status} {response.reason}")
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def retry_after(text: str) -> float | None:
    """Read ``Retry-After``: seconds, or a date, or nothing."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError):
        return None


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    secure = urllib.request.HTTPSHandler(context=ssl.create_default_context())  # once: reading all certificates is slow
    opener = urllib.request.build_opener(secure, _Redirects)
    opener.addheaders = [("User-Agent", "cachectl")]
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, at most ten; keeps secrets on their host and never leaves https, or http for anything else."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Any:
        """Return the next request."""
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in (old.scheme, "https"):
            raise HTTPError(req.full_url, code, f"redirect from {old.scheme} to {new.scheme}", headers, fp)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            for name, value in req.unredirected_hdrs.items():
                if name != "Host":
                    request.add_unredirected_header(name, value)
        return request

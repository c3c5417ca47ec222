"""Caches in S3 or any store that speaks its protocol; the extra ``s3`` (boto3), imported on first use.

Credentials, region and endpoint (``AWS_ENDPOINT_URL``) come from where boto3 always looks for them. It is boto3 and
not obstore, which hangs in a forked child (a data loader's worker) once the parent has used it, reads no profiles,
and takes a conflict of two writers for a file that is there.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, DistillError, TransferError
from vlm_distill_cache.common.locations import public_location
from vlm_distill_cache.common.printing import brief
from vlm_distill_cache.common.remotes.answers import LimitedResponse, limit_answers
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.http import CONTENT_RANGE, retry_after
from vlm_distill_cache.common.remotes.lease import lease
from vlm_distill_cache.common.remotes.streams import (
    Body,
    PassingError,
    RangeRefusedError,
    Retries,
    StoppedError,
    said,
)

_ABSENT = ("404", "NoSuchKey", "NotFound")
_NO_ACCESS = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
_MAY_PASS = ("SlowDown", "RequestTimeout", "ConditionalRequestConflict")
_CONNECTIONS = 32
_PIECE = 32 << 10  # bytes; a read returns when all of them are there, and a slow link must bring them in time


class S3Remote(Remote):
    """A prefix in a bucket, ``s3://BUCKET/PREFIX``."""

    def __init__(self, location: str, retries: Retries) -> None:
        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        if ":" in bucket or "@" in bucket:
            raise ConfigError(
                "s3://...: expected s3://BUCKET/PREFIX, without keys; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if not bucket or "?" in location or "//" in f"/{prefix}":
            raise ConfigError(f"{public_location(location)}: expected s3://BUCKET/PREFIX")
        try:
            import boto3  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"{location}: s3 needs boto3; run `pip install 'vlm-distill-cache[s3]'`") from error
        super().__init__(location.rstrip("/"), retries)
        self._bucket = bucket
        self._prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
        self._clients: dict[tuple[int, int], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_clients": {}}

    def _open(self, name: str, start: int = 0, stop: int | None = None) -> Body:
        wanted = f"bytes={start}-{stop - 1 if stop is not None else ''}"
        response = self._once(name, "get_object", **({"Range": wanted} if start or stop is not None else {}))
        stream, version = response["Body"], str(response.get("ETag", ""))[:200]
        limited = getattr(stream._raw_stream, "_original_response", None)

        def read(limit: int) -> bytes:
            with self._failures(self._where(name)):
                if isinstance(limited, LimitedResponse):
                    limited.allow(_PIECE)
                return bytes(stream.read(min(limit, _PIECE)))

        if (found := CONTENT_RANGE.fullmatch(response.get("ContentRange", ""))) is None:
            return Body(0, response.get("ContentLength"), read, stream.close, version)
        return Body(int(found[1]), None if found[3] == "*" else int(found[3]), read, stream.close, version)

    def size(self, name: str, *, expected: bool = False) -> int | None:
        """Return the bytes of a file, or None; see ``Remote``."""

        def attempt() -> int:
            with self._failures(self._where(name)):
                return int(self._once(name, "head_object")["ContentLength"])

        try:
            return self._retries.run(self._where(name), attempt, expected=expected)
        except FileNotFoundError:
            return None

    def upload(self, files: Mapping[str, Path], *, on_bytes: Callable[[int], object] | None = None) -> None:
        """Copy files here, large ones in parts, each visible when complete; see ``Remote``."""
        from boto3.s3.transfer import TransferConfig

        # Four parts at once: other shards are being uploaded beside this one.
        settings = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=4)
        client = self._client(2)  # which tries a part once more, before all of the file is sent again
        for name, source in files.items():
            where, counted = self._where(name), _Counter(on_bytes)

            def attempt(
                name: str = name, source: Path = source, where: str = where, counted: _Counter = counted
            ) -> None:
                counted.begin()
                with self._failures(where):
                    client.upload_file(
                        str(source), self._bucket, self._prefix + name, Callback=counted.add, Config=settings
                    )

            try:
                self._retries.run(where, attempt)
            except FileNotFoundError as error:
                raise TransferError(
                    f"{where}: {error.strerror}; check the bucket, and that {source} is there"
                ) from error

    def create(self, name: str, data: bytes) -> bool:
        """Write a small new file, or return False; see ``Remote``."""
        return self._put_if(name, data, lambda: self.size(name) is None, IfNoneMatch="*")

    def exchange(self, name: str, old: bytes, new: bytes) -> bool:
        """Write a small file over one with the old bytes, or return False; see ``Remote``."""
        with contextlib.suppress(FileNotFoundError, CacheFormatError):
            found = self._call(name, "head_object")
            if (now := self.read(name, max_bytes=len(old) + len(new))) == new:
                return True  # of an earlier try, whose answer was lost
            if now == old and self._put_if(name, new, lambda: True, IfMatch=found.get("ETag", "*")):
                return True
            return self.read(name, max_bytes=len(new)) == new
        return False

    def _put_if(self, name: str, data: bytes, may: Callable[[], bool], **condition: str) -> bool:
        """Write a file on a condition; a store without conditions is looked at, which is all that is left."""
        try:
            self._call(name, "put_object", Body=data, **condition)
        except FileExistsError:
            return False
        except TransferError as error:
            if _code(error.__cause__) not in ("501", "NotImplemented"):
                raise
            self.keeps_conditions = False
            if not may():
                return False
            self._call(name, "put_object", Body=data)
        return True

    def hold(self) -> AbstractContextManager[Callable[[], object]]:
        """Keep other pushes off; see ``Remote``."""
        return lease(self)

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; see ``Remote``."""
        for name in names:
            self._call(name, "delete_object")

    def _client(self, attempts: int = 1) -> Any:
        # A client per process: after a fork, two processes would talk over one connection.
        key = (os.getpid(), attempts)
        if key not in self._clients:
            import boto3
            from botocore.config import Config

            settings = Config(
                connect_timeout=self._retries.timeout,
                read_timeout=self._retries.timeout,
                max_pool_connections=_CONNECTIONS,
                retries={"mode": "standard", "total_max_attempts": attempts},
            )
            self._clients[key] = boto3.session.Session().client("s3", config=settings)
            limit_answers(self._clients[key])
        return self._clients[key]

    def _call(self, name: str, operation: str, **arguments: Any) -> Any:
        return self._retries.run(self._where(name), lambda: self._once(name, operation, **arguments))

    def _once(self, name: str, operation: str, **arguments: Any) -> Any:
        where = self._where(name)
        try:
            with self._failures(where):
                return getattr(self._client(), operation)(Bucket=self._bucket, Key=self._prefix + name, **arguments)
        except FileNotFoundError as error:
            if operation in ("get_object", "head_object"):
                raise
            raise TransferError(f"{where}: not found, though it was to be written; check bucket and address") from error

    @contextmanager
    def _failures(self, where: str) -> Iterator[None]:
        """Sort the library's errors into absent, transient and permanent; what it never meant to raise may pass."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import (
            BotoCoreError,
            ChecksumError,
            ClientError,
            FlexibleChecksumError,
            HTTPClientError,
            IncompleteReadError,
        )
        from botocore.exceptions import ConnectionError as BotoConnectionError
        from urllib3.exceptions import HTTPError

        broken = (BotoConnectionError, HTTPClientError, IncompleteReadError, ChecksumError, FlexibleChecksumError)
        try:
            yield
        except (DistillError, PassingError, StoppedError):
            raise
        except (*broken, HTTPError, HTTPException) as error:
            raise PassingError(said(error)) from error
        except BotoCoreError as error:  # no credentials, no region, a profile that does not exist
            raise TransferError(
                f"{where}: {said(error)}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error
        except OSError as error:
            if error.filename is not None:  # of a file here
                raise
            raise PassingError(said(error)) from error
        except Exception as error:  # of any class: its parsers fail wherever an answer makes no sense
            refused = error.__context__ if isinstance(error, S3UploadFailedError) else error  # who raises the former
            if isinstance(refused, ClientError):
                raise self._failure(where, refused) from refused
            raise PassingError(f"an answer that makes no sense ({type(refused).__name__})") from error

    def _failure(self, where: str, error: Any) -> Exception:
        code, answer = _code(error), error.response.get("ResponseMetadata", {})
        status = answer.get("HTTPStatusCode", 0)
        told = brief(" ".join(f"{'' if code == str(status) else code} {_told(error, 'Message')}".split()))
        phrase = http.client.responses.get(status, "")
        words = f"answered {status} {phrase}".rstrip() + (f" ({told})" if told not in ("", phrase) else "")
        if code == "NoSuchBucket":
            return TransferError(f"{where}: there is no bucket {self._bucket!r}; create it, or check the name")
        if code in _ABSENT:
            return FileNotFoundError(2, "no such file", where)
        if code in ("412", "PreconditionFailed"):
            return FileExistsError(17, "already there", where)
        if code == "InvalidRange" or status == 416:
            return RangeRefusedError(words)
        if (status >= 500 and status != 501) or status in (408, 429) or code in _MAY_PASS:
            return PassingError(words, retry_after=retry_after(answer.get("HTTPHeaders", {}).get("retry-after", "")))
        if code in _NO_ACCESS or status in (401, 403):
            return TransferError(
                f"{where}: {words}; check the credentials and the bucket's policy (a bucket that may not be "
                "listed says this of absent files too)"
            )
        return TransferError(f"{where}: {words}; check the address, and AWS_ENDPOINT_URL if it is set")


class _Counter:
    """Tells of a file's bytes as they go, and takes back those of a try that failed."""

    def __init__(self, tell: Callable[[int], object] | None) -> None:
        self._tell, self._counted, self._lock = tell, 0, threading.Lock()

    def begin(self) -> None:
        self.add(-self._counted)

    def add(self, size: int) -> None:
        with self._lock:  # the parts of a file go on threads of their own
            self._counted += size
        if self._tell is not None and size:
            self._tell(size)


def _code(error: Any) -> str:
    return _told(error, "Code")


def _told(error: Any, what: str) -> str:
    """What a store says of an error; nothing, where that is no text."""
    said_of_it = getattr(error, "response", {}).get("Error")
    told = said_of_it.get(what) if isinstance(said_of_it, dict) else None
    return told if isinstance(told, str) else ""

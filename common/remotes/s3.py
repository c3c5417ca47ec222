"""Caches in S3 or any store that speaks its protocol; the extra ``s3`` (boto3), imported on first use.

Credentials, region and endpoint (``AWS_ENDPOINT_URL``) come from where boto3 always looks for them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vlm_distill_cache.common.errors import ConfigError, TransferError
from vlm_distill_cache.common.files.disk import AGAIN
from vlm_distill_cache.common.remotes.streams import PassingError, RangeRefusedError, Retries, download_file, read_small

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

_ABSENT = ("404", "NoSuchKey", "NotFound")
_NO_ACCESS = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
_MAY_PASS = ("SlowDown", "RequestTimeout", "ConditionalRequestConflict")
_CONNECTIONS = 32


class S3Remote:
    """A prefix in a bucket.

    Args:
        location: ``s3://BUCKET/PREFIX``.
        retries: How patient to be.

    Raises:
        ConfigError: If the address names no bucket, or boto3 is not installed.
    """

    upload_files = 1
    upload_jobs = 8

    def __init__(self, location: str, retries: Retries) -> None:
        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        if not bucket or "?" in location or "//" in f"/{prefix}":
            raise ConfigError(f"{location}: expected s3://BUCKET/PREFIX")
        try:
            import boto3  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"{location}: s3 needs boto3; run `pip install 'vlm-distill-cache[s3]'`") from error
        self.location = location.rstrip("/")
        self._bucket = bucket
        self._prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
        self._retries = retries
        self._forget_clients()

    def _forget_clients(self) -> None:
        self._clients: dict[tuple[int, int], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_clients"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_clients()

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Return a small file whole; see ``Remote``."""
        where = self._where(name)
        return read_small(lambda: self._open(name), where, max_bytes=max_bytes, retries=self._retries)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None; see ``Remote``."""
        try:
            head = self._call(name, "head_object")
        except FileNotFoundError:
            return None
        return int(head["ContentLength"])

    def download(self, name: str, target: Path, *, size: int, on_bytes: Callable[[int], object] | None = None) -> None:
        """Append what is missing to ``target``; see ``Remote``."""

        def open_at(start: int) -> _S3Body:
            return self._open(name, start)

        where = self._where(name)
        download_file(open_at, where, target, size=size, retries=self._retries, on_bytes=on_bytes)

    def upload(self, files: Mapping[str, Path], *, on_bytes: Callable[[int], object] | None = None) -> None:
        """Copy files here, large ones in parts, each visible when complete; see ``Remote``."""
        from boto3.exceptions import S3UploadFailedError
        from boto3.s3.transfer import TransferConfig
        from botocore.exceptions import BotoCoreError, ClientError

        # Four parts at once: other shards are being uploaded beside this one.
        settings = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=4)
        for name, source in files.items():
            try:
                self._client(self._retries.attempts).upload_file(
                    str(source), self._bucket, self._key(name), Callback=on_bytes, Config=settings
                )
            except S3UploadFailedError as error:
                where = self._where(name)
                if isinstance(cause := error.__context__, ClientError):
                    failure = self._failure(where, cause)
                    if isinstance(failure, TransferError):
                        raise failure from error
                raise TransferError(f"{where}: {error}; {AGAIN}") from error
            except (BotoCoreError, ClientError) as error:
                raise TransferError(f"{self._where(name)}: {error}; {AGAIN}") from error

    def create(self, name: str, data: bytes) -> bool:
        """Write a small new file, or return False; see ``Remote``."""
        from botocore.exceptions import ClientError

        try:
            self._call(name, "put_object", Body=data, IfNoneMatch="*")
        except TransferError as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and _code(cause) in ("412", "PreconditionFailed"):
                return False
            if not isinstance(cause, ClientError) or _code(cause) not in ("501", "NotImplemented"):
                raise
            # A store without conditional writes: what is left is to look first.
            if self.size(name) is not None:
                return False
            self._call(name, "put_object", Body=data)
        return True

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; see ``Remote``."""
        for name in names:
            self._call(name, "delete_object")

    def _where(self, name: str) -> str:
        return f"{self.location}/{name}"

    def _key(self, name: str) -> str:
        return self._prefix + name

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
        return self._clients[key]

    def _call(self, name: str, operation: str, **arguments: Any) -> Any:
        return self._retries.run(self._where(name), lambda: self._once(name, operation, **arguments))

    def _once(self, name: str, operation: str, **arguments: Any) -> Any:
        """Ask once, and sort what goes wrong into absent, passing and lasting."""
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
        from botocore.exceptions import ConnectionError as BotoConnectionError

        where = self._where(name)
        try:
            return getattr(self._client(), operation)(Bucket=self._bucket, Key=self._key(name), **arguments)
        except ClientError as error:
            raise self._failure(where, error) from error
        except (BotoConnectionError, HTTPClientError) as error:
            raise PassingError(str(error)) from error
        except BotoCoreError as error:  # no credentials, no region, a profile that does not exist
            raise TransferError(
                f"{where}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error

    def _failure(self, where: str, error: Any) -> Exception:
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return TransferError(f"{where}: there is no bucket {self._bucket!r}; create it, or check the name")
        if code in _ABSENT:
            return FileNotFoundError(2, "no such file", where)
        if code == "InvalidRange" or status == 416:
            return RangeRefusedError(str(error))
        if (status >= 500 and status != 501) or status in (408, 429) or code in _MAY_PASS:
            headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            told = str(headers.get("retry-after", ""))
            return PassingError(str(error), retry_after=float(told) if told.isdecimal() else None)
        if code in _NO_ACCESS or status in (401, 403):
            return TransferError(
                f"{where}: {error}; check the credentials and the bucket's policy (a bucket that may not be "
                "listed says this of absent files too)"
            )
        return TransferError(f"{where}: {error}")

    def _open(self, name: str, start: int = 0) -> _S3Body:
        wanted = {"Range": f"bytes={start}-"} if start else {}
        return _S3Body(self._once(name, "get_object", **wanted), start)


class _S3Body:
    """An object that is arriving; see ``streams.Body``."""

    def __init__(self, response: dict[str, Any], start: int) -> None:
        self._stream = response["Body"]
        said = str(response.get("ContentRange", ""))
        if said.startswith("bytes ") and "-" in said:
            first, total = said.removeprefix("bytes ").partition("-")[0], said.rpartition("/")[2]
            self.start = int(first) if first.isdecimal() else start
            self.total: int | None = int(total) if total.isdecimal() else None
        else:
            self.start, self.total = 0, response.get("ContentLength")

    def read(self, limit: int) -> bytes:
        """Return the next bytes, at most ``limit``."""
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        try:
            # Small pieces, for this call returns when all of one is there: a trickle must be noticed.
            block: bytes = self._stream.read(min(limit, 64 << 10))
        except (BotoCoreError, HTTPError, OSError) as error:
            raise PassingError(str(error) or type(error).__name__) from error
        return block

    def close(self) -> None:
        """Give the connection back."""
        self._stream.close()


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))

"""Caches in S3 or any store that speaks its protocol; the extra ``s3`` (boto3), imported on first use.

Credentials, region and endpoint (``AWS_ENDPOINT_URL``) come from where boto3 always looks for them. It is boto3 and
not obstore, which hangs in a forked child (a data loader's worker) once the parent has used it, reads no profiles,
and takes a conflict of two writers for a file that is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import ConfigError, TransferError
from vlm_distill_cache.common.files.disk import AGAIN
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.http import CONTENT_RANGE, retry_after
from vlm_distill_cache.common.remotes.streams import (
    Body,
    PassingError,
    RangeRefusedError,
    Retries,
)

_ABSENT = ("404", "NoSuchKey", "NotFound")
_NO_ACCESS = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
_MAY_PASS = ("SlowDown", "RequestTimeout", "ConditionalRequestConflict")
_CONNECTIONS = 32


class S3Remote(Remote):
    """A prefix in a bucket, ``s3://BUCKET/PREFIX``."""

    def __init__(self, location: str, retries: Retries) -> None:
        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        if not bucket or "?" in location or "//" in f"/{prefix}":
            raise ConfigError(f"{location}: expected s3://BUCKET/PREFIX")
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
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        response = self._once(name, "get_object", **({"Range": f"bytes={start}-"} if start else {}))
        stream = response["Body"]

        def read(limit: int) -> bytes:
            try:
                # Small pieces, for this call returns when all of one is there: a trickle must be noticed.
                return bytes(stream.read(min(limit, 64 << 10)))
            except (BotoCoreError, HTTPError, OSError) as error:
                raise PassingError(str(error) or type(error).__name__) from error

        if (found := CONTENT_RANGE.fullmatch(response.get("ContentRange", ""))) is None:
            return Body(0, response.get("ContentLength"), read, stream.close)
        return Body(int(found[1]), None if found[3] == "*" else int(found[3]), read, stream.close)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None; see ``Remote``."""
        try:
            return int(self._call(name, "head_object")["ContentLength"])
        except FileNotFoundError:
            return None

    def upload(self, files: Mapping[str, Path], *, on_bytes: Callable[[int], object] | None = None) -> None:
        """Copy files here, large ones in parts, each visible when complete; see ``Remote``."""
        from boto3.s3.transfer import TransferConfig

        # Four parts at once: other shards are being uploaded beside this one.
        settings = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=4)
        client = self._client(self._retries.attempts)  # which tries a part again, not the whole file
        for name, source in files.items():
            where = self._where(name)
            try:
                with self._failures(where):
                    client.upload_file(
                        str(source), self._bucket, self._prefix + name, Callback=on_bytes, Config=settings
                    )
            except (PassingError, FileNotFoundError) as error:
                raise TransferError(f"{where}: {error}; {AGAIN}") from error

    def create(self, name: str, data: bytes) -> bool:
        """Write a small new file, or return False; see ``Remote``."""
        try:
            self._call(name, "put_object", Body=data, IfNoneMatch="*")
        except FileExistsError:
            return False
        except TransferError as error:
            if _code(error.__cause__) not in ("501", "NotImplemented"):
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
        with self._failures(self._where(name)):
            return getattr(self._client(), operation)(Bucket=self._bucket, Key=self._prefix + name, **arguments)

    @contextmanager
    def _failures(self, where: str) -> Iterator[None]:
        """Sort the library's errors into absent, transient and permanent."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
        from botocore.exceptions import ConnectionError as BotoConnectionError

        try:
            yield
        except (ClientError, S3UploadFailedError) as error:
            refused = error if isinstance(error, ClientError) else error.__context__  # who raises the latter
            raise self._failure(where, refused) from refused
        except (BotoConnectionError, HTTPClientError) as error:
            raise PassingError(str(error)) from error
        except BotoCoreError as error:  # no credentials, no region, a profile that does not exist
            raise TransferError(
                f"{where}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error

    def _failure(self, where: str, error: Any) -> Exception:
        code, said = _code(error), error.response.get("ResponseMetadata", {})
        status = said.get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return TransferError(f"{where}: there is no bucket {self._bucket!r}; create it, or check the name")
        if code in _ABSENT:
            return FileNotFoundError(2, "no such file", where)
        if code in ("412", "PreconditionFailed"):
            return FileExistsError(17, "already there", where)
        if code == "InvalidRange" or status == 416:
            return RangeRefusedError(str(error))
        if (status >= 500 and status != 501) or status in (408, 429) or code in _MAY_PASS:
            return PassingError(str(error), retry_after=retry_after(said.get("HTTPHeaders", {}).get("retry-after", "")))
        if code in _NO_ACCESS or status in (401, 403):
            return TransferError(
                f"{where}: {error}; check the credentials and the bucket's policy (a bucket that may not be "
                "listed says this of absent files too)"
            )
        return TransferError(f"{where}: {error}")


def _code(error: Any) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))

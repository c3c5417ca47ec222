"""Where caches are copied from and to: folders, ``s3://``, ``hf://datasets/...`` and, to read, ``http(s)://``."""

from __future__ import annotations

from pathlib import Path

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.directory import DirectoryRemote
from vlm_distill_cache.common.remotes.http import HttpRemote
from vlm_distill_cache.common.remotes.streams import Retries

__all__ = ["DirectoryRemote", "Remote", "open_remote"]

ATTEMPTS, TIMEOUT = 5, 30.0


def open_remote(location: str | Path, *, attempts: int = ATTEMPTS, timeout: float = TIMEOUT) -> Remote:
    """Open a place that holds, or shall hold, a cache; nothing is sent yet.

    Args:
        location: A folder, ``s3://BUCKET/PREFIX``, ``hf://datasets/ORG/NAME[@REVISION][/FOLDER]`` or ``https://...``.
        attempts: How often a request is tried before it counts as failed, 1 or more.
        timeout: Seconds without an answer, or with next to nothing arriving, that count as a failed try.

    Raises:
        ConfigError: If the address is not of these kinds, or a library it needs is not installed.
    """
    if not is_url(location):
        if "://" in str(location):
            raise ConfigError(
                f"{location}: unknown kind of address; use a folder, s3://BUCKET/PREFIX, "
                "hf://datasets/ORG/NAME or, to pull, https://..."
            )
        return DirectoryRemote(Path(location))
    text, retries = str(location), Retries(attempts=attempts, timeout=timeout)
    # Imported here: boto3 and huggingface_hub take most of a second each.
    if text.startswith("s3://"):
        from vlm_distill_cache.common.remotes.s3 import S3Remote

        return S3Remote(text, retries)
    if text.startswith("hf://"):
        from vlm_distill_cache.common.remotes.hub import HubRemote

        return HubRemote(text, retries)
    return HttpRemote(text, retries)

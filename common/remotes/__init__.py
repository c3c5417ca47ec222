"""Where caches are copied from and to: folders, ``s3://``, ``hf://datasets/...`` and, to read, ``http(s)://``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.locations import is_url, public_location
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.directory import DirectoryRemote
from vlm_distill_cache.common.remotes.http import HttpRemote
from vlm_distill_cache.common.remotes.hub import HubRemote
from vlm_distill_cache.common.remotes.s3 import S3Remote
from vlm_distill_cache.common.remotes.streams import Retries

_KINDS: dict[str, Callable[[str, Retries], Remote]] = {
    "s3": S3Remote,
    "hf": HubRemote,
    "http": HttpRemote,
    "https": HttpRemote,
}


def open_remote(location: str | Path, *, attempts: int = 5, timeout: float = 30.0) -> Remote:
    """Open a place that holds, or shall hold, a cache; nothing is sent yet.

    Args:
        location: A folder, ``s3://BUCKET/PREFIX``, ``hf://datasets/ORG/NAME[@REVISION][/FOLDER]`` or ``https://...``.
        attempts: How often a request is tried before it counts as failed, 1 or more.
        timeout: Seconds without an answer, or with next to nothing arriving, that count as a failed try.

    Raises:
        ConfigError: If the address is not of these kinds, or a library it needs is not installed.
    """
    text = str(location)
    if is_url(location):
        if not text.startswith("http") and (public := public_location(text)) != text:
            raise ConfigError(
                f"{public}: expected an address alone; keys in it end up in logs. S3 takes them from AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY or a profile (AWS_PROFILE), the hub from HF_TOKEN"
            )
        return _KINDS[text.partition("://")[0]](text, Retries(attempts=attempts, timeout=timeout))
    if "://" in text:
        raise ConfigError(
            f"{public_location(text)}: unknown kind of address; use a folder, s3://BUCKET/PREFIX, "
            "hf://datasets/ORG/NAME or, to pull, https://..."
        )
    return DirectoryRemote(Path(location))

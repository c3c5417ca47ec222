"""Data at addresses: tars and parquet files on ``s3://``, ``https://`` and, named as data sets are, the hub.

Nothing of them is listed but which files there are: a brace pattern says so. Parquet is read by ranges; a tar comes here
when one of its samples is asked for, and leaves when the room is needed (`common.remotes.copies`). Such data are told from
others by their files, not by their texts, all of which would have to be fetched first.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from vlm_distill_cache.common.errors import ConfigError, DataError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.locations import public_location
from vlm_distill_cache.common.remotes.copies import RemoteFile, describe_files
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.sources.parquet import ParquetDataset, RemoteParquet
from vlm_distill_cache.data.sources.webdataset import WebDataset

KINDS = (".tar", ".parquet")


def open_addresses(pattern: str, *, images: Path | None = None) -> Dataset:
    """Open files at an address, or at all that a brace pattern means.

    Raises:
        DataError: One is not there, or the address says more than where they are.
        TransferError: They cannot be reached.
    """
    from webdataset.shardlists import expand_urls  # imports a whole loader, only needed here

    plain, mark, _ = pattern.partition("?")
    shown = public_location(pattern)
    if mark:
        raise DataError(
            f"data {shown!r}: an address with a query is written down with a cache's options, and the query may be a key; use a "
            "server that this machine may read, or S3 with its own credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE)"
        )
    if "*" in plain or "[" in plain:
        raise DataError(
            f"data {shown!r}: files at an address are not searched for; say which there are in braces: NAME-{{000000..000999}}.tar"
        )
    try:
        files = describe_files(expand_urls(plain))
    except ConfigError as error:
        raise DataError(f"data {shown!r}: {error}") from error
    dataset = open_remote_files(files, name=PurePosixPath(plain).name, where=shown, images=images)
    dataset.origin = {"address": shown, "versions": fingerprint([file.stamp() for file in files])}
    return dataset


def open_remote_files(files: Sequence[RemoteFile], *, name: str, where: str, images: Path | None) -> Dataset:
    """Open files of one kind that lie elsewhere."""
    if PurePosixPath(files[0].name).suffix.lower() == ".parquet":
        sources = [RemoteParquet(file) for file in files]
        return ParquetDataset(sources, name=name, where=where, image_root=images, by_files=True)
    dataset = WebDataset(where, paths=files, by_files=True)
    dataset.name = name
    return dataset

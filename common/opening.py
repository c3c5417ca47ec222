"""Open a finished cache for reading, wherever it is: a folder or an address in, a ``TeacherCache`` out."""

from pathlib import Path

from vlm_distill_cache.common.cache.reader import OPEN_SHARDS, TeacherCache
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.locations import is_url, public_location


def open_cache(location: Path | str, *, open_shards: int = OPEN_SHARDS) -> TeacherCache:
    """Open a finished cache for reading; a read-only folder will do.

    Args:
        location: The cache folder; or an address (``s3://BUCKET/PREFIX``, ``hf://datasets/ORG/NAME``, ``https://...``),
            whose files are fetched into a local mirror as they are needed.
        open_shards: Shards kept open, and decoded in memory, at a time.

    Raises:
        CacheFormatError: If it is no cache, not sealed, damaged, or from a newer format version.
        TransferError: If an address cannot be read.
    """
    if not is_url(location):
        return TeacherCache(Path(location), open_shards=open_shards, codec_of=codec_from_dict)
    from vlm_distill_cache.common.remotes.mirror import find_mirror  # only who reads from afar needs a client

    mirror = find_mirror(str(location))
    return TeacherCache(
        mirror.folder,
        place=public_location(str(location)),
        open_shards=open_shards,
        before_open=mirror.hold,
        codec_of=codec_from_dict,
    )

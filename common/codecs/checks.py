"""What every record of a sound cache fulfils, whoever wrote it; ``verify`` asks for it.

A checksum tells that bytes are the ones that were written. These checks tell that somebody's codec could have
written them: a cache whose checksums were made anew after a change must still stand them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_distill_cache.common.attention.tiles import NOWHERE, tiles_of
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import ONE_PICTURE, Record, base_fields
from vlm_distill_cache.common.cache.shared_images import VISUAL_SOURCE
from vlm_distill_cache.common.codecs.description import Codec, setting_names, shown
from vlm_distill_cache.common.codecs.registry import CODECS, codec_from_dict
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.printing import one_line


def codec_damage(signals: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Name the signals whose values cannot be checked here.

    Returns:
        Codecs and settings that this version does not know; and settings of codecs it knows that none can have.
    """
    newer: list[str] = []
    impossible: list[str] = []
    for signal, settings in sorted(signals.items()):
        codec, name = settings.get("codec"), f"signals.{one_line(signal)}"
        known = CODECS.get(codec) if isinstance(codec, str) else None
        if known is None:
            newer.append(f"{name}: codec {shown(codec)} is not known")
        elif unknown := settings.keys() - {"codec", *setting_names(known)}:
            newer.append(f"{name}: settings {one_line(sorted(unknown), limit=80)} of codec {codec!r} are not known")
        else:
            impossible += [f"{name}: {line}" for line in known.settings_damage(settings)]
    return newer, impossible


def value_damage(record: Record, plan: Plan) -> Iterator[str]:
    """Yield what no codec of the plan writes: token ids, counts, masses and codes out of their range.

    Args:
        record: Of the plan's fields, dtypes and shapes.
    """
    codecs = [codec_from_dict(settings) for settings in plan.signals.values() if str(settings.get("codec")) in CODECS]
    strange = [*_field_damage(record, codecs), *_version_damage(plan, codecs)]
    yield from strange
    infinite = {name: value for codec in codecs for name, value in codec.infinite.items()}
    for name, array in record.items():
        if array.dtype.kind == "f" and name != "frame_times":  # which has NaN for stills, and a check of its own
            allowed = np.isfinite(array) | (array == infinite.get(name, 0.0))
            if not allowed.all():
                yield f"{name} holds {array[~allowed][0]}; expected finite values"
    vocabulary: Any = plan.teacher.get("vocabulary")
    for field in (*base_fields(plan.format_version), *(field for codec in codecs for field in codec.fields())):
        tokens = record.get(field.name) if field.dtype == "u4" else None  # such are token ids
        if tokens is not None and isinstance(vocabulary, int) and (tokens >= vocabulary).any():
            yield f"{field.name} has {tokens.max()}, the vocabulary has {vocabulary}"
    strange += (wrong := list(_tiles_damage(record, plan, codecs)) or list(_token_count_damage(record, codecs)))
    yield from wrong
    if not strange:  # codecs build on dtypes and on the number of tokens
        for codec in codecs:
            yield from codec.damage(record)


def _field_damage(record: Record, codecs: Sequence[Codec]) -> Iterator[str]:
    """Yield arrays that are not of the dtype and shape that their codec writes."""
    for codec in codecs:
        for field in codec.fields():
            found = record.get(field.name)
            if found is None:
                yield f"{field.name} is missing, which codec {codec.signal!r} writes"
            elif found.dtype != field.numpy_dtype or found.shape[1:] != field.trailing:
                yield (
                    f"{field.name} has rows of {found.dtype} {found.shape[1:]}; codec {codec.signal!r} writes "
                    f"{field.numpy_dtype} {field.trailing}"
                )


def _version_damage(plan: Plan, codecs: Sequence[Codec]) -> Iterator[str]:
    """Yield codecs of rows that keep one picture in a cache of several, or the other way round."""
    for codec in codecs:
        if isinstance(codec, RowAttentionCodec) and codec.several != (plan.format_version != ONE_PICTURE):
            yield (
                f"codec {codec.signal!r} has several={str(codec.several).lower()}, which is not that of format version "
                f"{plan.format_version}"
            )


def _tiles_damage(record: Record, plan: Plan, codecs: Sequence[Codec]) -> Iterator[str]:
    try:
        tiles = tiles_of(record)
    except CacheFormatError as error:
        yield str(error)
        return
    tokens = sum(tile.token_count for tile in tiles)
    if tiles and all(tile.region == NOWHERE for tile in tiles):
        # Of a model that nobody described: its tokens have no place, so nothing can say how it looks at them.
        yield from (f"tiles are nowhere, but there is {codec.signal!r}" for codec in codecs if codec.of_image)
    longest = plan.extra.get("max_length")
    if isinstance(longest, int) and 0 < longest < tokens:
        yield f"tiles have {tokens} visual tokens; the teacher's sequences had at most {longest} in all"
    if plan.format_version == ONE_PICTURE:
        if tiles and not record["image_hash"].any():
            yield "image_hash is zero, which says that there is no image, but there are tiles of one"
    elif not record["image_hash"].any(axis=1).all():
        yield "image_hash has a picture of zeros; a sample without pictures has none"


def _token_count_damage(record: Record, codecs: Sequence[Codec]) -> Iterator[str]:
    """Yield arrays of the image that have another number of tokens than its tiles."""
    tiles = tiles_of(record)
    expected = {name: size for codec in codecs for name, size in codec.image_lengths(tiles).items() if name in record}
    if VISUAL_SOURCE.name in record and not any(len(record[name]) for name in expected):
        return  # `common.cache.shared_images` says where they are
    for name, size in expected.items():
        if len(record[name]) != size:
            yield f"{name} has {len(record[name])} along its first axis; the tiles of the image say {size}"

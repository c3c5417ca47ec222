"""Pictures and videos that were encoded before are read as bytes of pixels from disk, not decoded and scaled again.

What is kept of a sample's pictures goes by the bytes that hold them, by all that decides what becomes of them, and by the
versions of the libraries that did it: a file that changed, another student or another Pillow meets nothing of another's.
Pictures whose bytes cannot be told (drawn ones), and processors that are not described whole, are encoded each time.
"""

import json
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import features

from vlm_distill_cache.common.attention.tiles import Tile
from vlm_distill_cache.common.errors import DistillError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.files.record_file import RecordFile
from vlm_distill_cache.common.files.versions import installed_versions
from vlm_distill_cache.data.images.byte_pixels import BytePixels, Held, ImageInputs, held_of
from vlm_distill_cache.data.images.encoder import EncodedImage
from vlm_distill_cache.data.images.layouts import geometry_of
from vlm_distill_cache.data.sample import DigestedImage, DigestedVideo, Medium
from vlm_distill_cache.data.text.chat import Marker
from vlm_distill_cache.data.text.media import EncodedMedium, MediaSettings, encode_media

FILE = "pixels.bin"
_FORMAT = 1
_LENGTH = struct.Struct("<I")
_LIBRARIES = ("pillow", "numpy", "transformers", "av", "vlm-distill-cache")


class DescribedSettings(MediaSettings, Protocol):
    """What `SampleEncoder` says of pictures, and a name for all of it."""

    @property
    def media_identity(self) -> str | None:
        """`identity_of` these settings."""


class PixelCache:
    """Where the encoded pictures of samples are kept; nothing is kept or read before it is opened."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._records: RecordFile | None = None

    def open(self, folder: Path, limit: int) -> None:
        """Keep pictures in a folder, which is made, and read those that are there.

        Args:
            limit: Bytes of what is kept there, at most.

        Raises:
            OSError: If the folder cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._records = RecordFile(folder / FILE, limit)

    def close(self) -> None:
        """Keep and read no more."""
        if self._records is not None:
            self._records.close()
        self._records = None

    def media(self, settings: DescribedSettings, media: Sequence[Medium]) -> list[EncodedMedium]:
        """`encode_media`, or what it gave before; raises as that does."""
        records = self._records
        key = None if records is None else _key(settings, media)
        if records is None or key is None:
            return encode_media(settings, media)
        stored = records.get(key)
        if stored is not None and (found := _unpack(stored, settings.pixel_tables)) is not None:
            return found
        made = encode_media(settings, media)
        if _key(settings, media) == key:  # else a file changed meanwhile
            records.put(key, _pack(made, settings.pixel_tables))
        return made


def bytes_kept(folder: Path) -> int:
    """Bytes of what a folder keeps of pictures; 0 if it is not there."""
    file = folder / FILE
    return file.stat().st_size if file.is_file() else 0


def identity_of(settings: MediaSettings) -> str | None:
    """A name for all that decides what becomes of pictures and videos, but their bytes; None: not all of it is known."""
    encoder = settings.image_encoder
    geometry = geometry_of(encoder, videos=True)
    if geometry.get("kind") == "library":  # its text depends on a tokenizer, its pixels on whatever it does
        return None
    sampling = settings.sampling
    return fingerprint(
        {
            "format": _FORMAT,
            "libraries": _versions(),
            "geometry": json.dumps(geometry, sort_keys=True, default=str),
            "processor": [
                type(encoder.processor).__name__,
                json.dumps(encoder.processor.to_dict(), sort_keys=True, default=str),
            ],
            "markers": [settings.image_token, settings.video_token],
            "sampling": None if sampling is None else [sampling.fps, sampling.most],
            "most_pictures": settings.most_pictures,
            "visual_token_budget": settings.visual_token_budget,
        }
    )


@cache
def _versions() -> dict[str, str]:
    codecs = ("jpg", "libjpeg_turbo", "webp", "zlib", "jpg_2000", "libtiff", "avif")
    return installed_versions(_LIBRARIES) | {name: str(features.version(name)) for name in codecs}


def _key(settings: DescribedSettings, media: Sequence[Medium]) -> bytes | None:
    """What a sample's pictures are kept under; None: they cannot be told apart, or there are none."""
    identity, digests = settings.media_identity, list[tuple[str, str | None]]()
    if identity is None or not media:
        return None
    try:
        for medium in media:
            if isinstance(medium, DigestedImage):
                digests.append(("picture", medium.digest()))
            elif isinstance(medium, DigestedVideo) and settings.sampling is not None:
                digests.append(("video", medium.digest_of(settings.sampling)))
            else:
                return None
    except (DistillError, OSError):  # who decodes it says what is wrong
        return None
    told = all(digest is not None for _, digest in digests)
    return bytes.fromhex(fingerprint([identity, digests])) if told else None


def _pack(media: Sequence[EncodedMedium], tables: Sequence[np.ndarray]) -> list[bytes]:
    """Encoded pictures as a record's parts: what is said of them, as JSON with its length in front, and the arrays."""
    arrays: list[np.ndarray] = []

    def described(name: str, held: Held) -> list[Any]:
        if isinstance(held, BytePixels):
            arrays.append(held.data)
            table = next(number for number, table in enumerate(tables) if table is held.table)
            return [name, held.data.dtype.str, held.data.shape, table, held.shape]
        arrays.append(held)
        return [name, held.dtype.str, held.shape, None, None]

    said = [
        {
            "markers": [[marker.text, marker.kind] for marker in medium.markers],
            "encoded": [
                {
                    "inputs": [described(name, held) for name, held in held_of(image.inputs).items()],
                    "tiles": [
                        [int(t.rows), int(t.cols), [*map(float, t.region)], [*map(float, t.span)], bool(t.is_frame)]
                        for t in image.tiles
                    ],
                    "text": image.text,
                }
                for image in medium.encoded
            ],
            "hashes": [digest.hex() for digest in medium.hashes],
            "times": medium.times,
        }
        for medium in media
    ]
    head = json.dumps(said).encode()
    return [_LENGTH.pack(len(head)), head, *(array.tobytes() for array in arrays)]


def _unpack(data: bytes, tables: Sequence[np.ndarray]) -> list[EncodedMedium] | None:
    """Inverse of `_pack`; None for bytes that are no such record."""
    try:
        (length,) = _LENGTH.unpack_from(data)
        at = _LENGTH.size + length

        def read(dtype: str, shape: Sequence[int], table: int | None, numbers: Sequence[int] | None) -> Held:
            nonlocal at
            count = int(np.prod(shape))
            array = np.frombuffer(data, dtype=dtype, count=count, offset=at).reshape(shape)
            at += array.nbytes
            if table is None or numbers is None:
                return array.copy()  # in its own memory, as its type needs it
            return BytePixels(data=array, table=tables[table], shape=tuple(numbers))

        def image(said: dict[str, Any]) -> EncodedImage:
            return EncodedImage(
                inputs=ImageInputs({name: read(*rest) for name, *rest in said["inputs"]}),
                tiles=tuple(
                    Tile(rows=rows, cols=cols, region=tuple(region), span=tuple(span), is_frame=is_frame)
                    for rows, cols, region, span, is_frame in said["tiles"]
                ),
                text=said["text"],
            )

        return [
            EncodedMedium(
                markers=tuple(Marker(text, kind) for text, kind in said["markers"]),
                encoded=tuple(image(one) for one in said["encoded"]),
                hashes=tuple(map(bytes.fromhex, said["hashes"])),
                times=tuple((number, time) for number, time in said["times"]),
            )
            for said in json.loads(data[_LENGTH.size : _LENGTH.size + length])
        ]
    except (ValueError, TypeError, LookupError, struct.error, DistillError):
        return None

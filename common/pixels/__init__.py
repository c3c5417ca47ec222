"""Pixels as teacher and student see them: one decoder for whatever a file holds, and one hash.

Training sets hold rotated phones' JPEGs, CMYK scans, palettes, alpha, 16-bit greys and truncated
downloads. Teacher and student must see the same pixels, so all of it is settled here, once, and
the pixels' hash travels with the sample.
"""

import io
import struct
import zlib

import PIL.ExifTags
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import xxhash

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels.rgb import MAX_PIXELS, to_rgb

HASH_BYTES = 16
STORED = "stored orientation"
_PNG = b"\x89PNG\r\n\x1a\n"

# What Pillow's decoders raise on damaged files, by experience; none of it may end a run.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    MemoryError,
    ArithmeticError,
    AttributeError,  # Pillow on a damaged EXIF block
    PIL.Image.DecompressionBombError,
    PIL.Image.DecompressionBombWarning,
)


def decode_image(data: bytes, *, name: str) -> PIL.Image.Image:
    """Decode an encoded image to upright RGB; of an animation, the first frame.

    How it lies in the file, EXIF's number from 1 to 8, stands in its ``info`` under `STORED`.

    Args:
        data: The file's bytes.
        name: What errors call it.

    Raises:
        SampleError: The bytes are empty, damaged, too large or not an image.
    """
    if not data:
        raise SampleError(f"image {name} is empty (0 bytes)")
    try:
        try:
            return _decode(data, name)
        except ValueError as error:
            if isinstance(error, SampleError) or not data.startswith(_PNG):
                raise
            return _decode(_without_texts(data), name)  # Pillow takes a long text for an attack
    except SampleError:
        raise
    except DECODE_ERRORS as error:
        raise SampleError(f"image {name} cannot be decoded: {reason_of(error)}") from error


def _decode(data: bytes, name: str) -> PIL.Image.Image:
    with PIL.Image.open(io.BytesIO(data)) as image:
        _refuse_huge(image, name)  # before any pixel is decoded
        return upright_rgb(image)


def upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Decode an open image, or the frame that it stands at, to upright RGB; a picture of its own, ``info`` as above."""
    stored = (
        image.tile[0][3]
        if isinstance(image, PIL.ImageFile.ImageFile) and image.format == "PNG" and image.tile
        else None
    )
    image.load()
    _scale_transparency(image, stored)
    turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
    upright = to_rgb(PIL.ImageOps.exif_transpose(image))
    upright.info[STORED] = turned
    return upright


def _without_texts(data: bytes) -> bytes:
    """A PNG without its texts and colour profile, which say nothing of its pixels; those that may hold EXIF stay."""
    kept, at = [data[: len(_PNG)]], len(_PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        chunk = data[at : at + 12 + length]
        at += 12 + length
        holds_exif = chunk[8:].startswith((b"XML:com.adobe.xmp", b"Raw profile type"))
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or holds_exif:
            kept.append(chunk)
    return b"".join(kept)


def _scale_transparency(image: PIL.Image.Image, stored: object) -> None:
    """Bring the colour that a PNG names as transparent to the 8 bits that Pillow brings the pixels to.

    Args:
        image: Loaded; changed in place.
        stored: How the file holds its pixels, in Pillow's words.
    """
    colour = image.info.get("transparency")
    if stored in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _refuse_huge(image: PIL.Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise SampleError(
            f"image {name} has {width} x {height} pixels, more than the {MAX_PIXELS} allowed; scale it down first"
        )


def image_hash(image: PIL.Image.Image) -> bytes:
    """Hash what the model will see: width, height and RGB pixels, not the file's bytes.

    A re-compressed PNG keeps its hash; a re-compressed JPEG, a crop or a flip does not.

    Args:
        image: RGB.

    Returns:
        xxh3_128 of ``<u4 width, <u4 height, pixels`` as 16 bytes.
    """
    digest = xxhash.xxh3_128(struct.pack("<II", *image.size))
    digest.update(image.tobytes())
    return digest.digest()


def reason_of(error: BaseException) -> str:
    """Say why, without the path that the caller names anyway."""
    if isinstance(error, PIL.UnidentifiedImageError):  # its text has an address in memory, another one in each run
        return "no image of a known format"
    text = str(error) if not isinstance(error, OSError) else error.strerror or str(error)
    return text or type(error).__name__

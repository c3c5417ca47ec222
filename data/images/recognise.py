"""What looks like a picture, a video or a sound: by the name of a file, by its first bytes, by base64 of either.

Readers ask this of what they were not told about, so that a picture under a name that they do not know is never
taken for text. Which formats are pictures is for Pillow to say: what it opens is one.
"""

import base64
import binascii
import re
import struct
from collections.abc import Callable
from functools import cache

import PIL.Image

_VIDEOS = "mp4 m4v webm mkv avi mov mpg mpeg mpe m2v wmv flv f4v 3gp 3g2 ogv m2ts vob"
VIDEO_EXTENSIONS = frozenset(_VIDEOS.split())
_SOUNDS = frozenset("wav mp3 flac ogg oga opus m4a aac wma aiff".split())  # noqa: SIM905
# Pictures by their names that Pillow may not open: one that cannot be decoded is better than one that is not seen.
_MORE_PICTURES = "heic heif avif jxl svg raw dng cr2 cr3 nef arw orf rw2"
# Formats that Pillow tells by their first bytes and that hold no picture for it to decode, or a video.
_NO_PICTURES = frozenset({"BUFR", "GRIB", "HDF5", "MPEG"})
_WEAK_MARKS = frozenset({"PCX", "PPM"})  # a text may begin like one
_PPM = re.compile(rb"P[1-7fF][\s#]")
_TEXT = re.compile(rb"[\t\n\r -~]*")
_HEAD_BYTES = 16  # what Pillow shows its plugins
_LONGEST_NAME = 4096
_LEAST_BASE64 = 40  # characters; the smallest GIF has 43 bytes
_NAME = re.compile(r"[^\n\r\t<>]{1,4096}")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}")
# Pillow opens them, but as the end of a text they are mostly something else: a domain, a word, a document.
_RARE = frozenset("ps eps im iim rgb rgba bw raw ras fit fits msp cur pxr ftc ftu icb vda vst".split())  # noqa: SIM905
_MOST_WORDS = 3  # of a file's name without a folder; more are a sentence


@cache
def picture_extensions() -> frozenset[str]:
    """Extensions of picture files, lower case, without the dot: all that Pillow opens, and a few that it does not."""
    opened = PIL.Image.registered_extensions().items()
    known = {extension[1:] for extension, kind in opened if kind in PIL.Image.OPEN and kind not in _NO_PICTURES}
    return frozenset(known - VIDEO_EXTENSIONS) | frozenset(_MORE_PICTURES.split())


def extension_of(name: str) -> str:
    """The part behind the last dot of a file's name or of an address, lower case; empty without one."""
    if "." not in name:
        return ""
    name = name.strip()
    if "://" in name or name.startswith("//"):
        name = name.split("//", 1)[1].partition("/")[2]  # an address's host ends in no extension
    base = re.split(r"[?#]", name, maxsplit=1)[0].replace("\\", "/").rsplit("/", 1)[-1]
    return base.rpartition(".")[2].partition(":")[0].lower() if "." in base else ""


def may_name_file(text: str) -> bool:
    """Whether a text may be the name of a file, or hold one; if not, `names_picture` and its like need not look."""
    return "." in text or len(text) >= _LEAST_BASE64 or ":" in text[:16] or ";" in text


def names_picture(text: str) -> bool:
    """Whether a text is the name or address of a picture file, or holds a picture as base64."""
    if text[:16].lstrip().lower().startswith("data:image/"):
        return True
    extension = extension_of(text) if len(text) <= _LONGEST_NAME else ""
    if extension in picture_extensions() and extension not in _RARE and _is_name(text):
        return True
    return base64_picture(text) is not None


def names_video(text: str) -> bool:
    """Whether a text is the name or address of a video file, or holds one as a ``data:`` address."""
    if text[:16].lstrip().lower().startswith("data:video/"):
        return True
    return len(text) <= _LONGEST_NAME and extension_of(text) in VIDEO_EXTENSIONS and _is_name(text)


def names_sound(text: str) -> bool:
    """Whether a text is the name or address of a sound file, or holds one as a ``data:`` address."""
    if text[:16].lstrip().lower().startswith("data:audio/"):
        return True
    return len(text) <= _LONGEST_NAME and extension_of(text) in _SOUNDS and _is_name(text)


def _is_name(text: str) -> bool:
    text = text.strip()
    is_sentence = len(text.split()) > _MOST_WORDS and "/" not in text and "\\" not in text
    return not is_sentence and bool(_NAME.fullmatch(text))


def is_picture(data: bytes) -> bool:
    """Whether bytes begin as a file does that Pillow opens; a format that has no mark of its own is none."""
    head = bytes(data[:_HEAD_BYTES])
    if _TEXT.fullmatch(head):
        return False  # a text; "BMW" begins as a BMP does, "#define" as an XBM
    for accept in _marks():
        try:
            if accept(head) is True:
                return True
        except (SyntaxError, IndexError, TypeError, ValueError, struct.error):
            continue  # Pillow asks its plugins in the same way
    return bool(_PPM.match(head))


def base64_picture(text: str) -> bytes | None:
    """The bytes of a picture that a text holds as base64, with or without ``data:`` in front; None: it holds none."""
    text = text.strip()
    head, comma, _ = text[:256].partition(",")
    if comma and head.lower().endswith(";base64"):  # data:image/png;base64, or without its first word
        text = text[len(head) + 1 :]
        claimed = "image/" in head.lower()
    elif head.lower().startswith("data:"):
        return None
    else:
        claimed = False
    if not claimed:
        start = text[: 4 * _HEAD_BYTES]
        if len(text) < _LEAST_BASE64 or "." in start or not is_picture(_decode(start) or b""):
            return None
    return _decode(text) if claimed or _BASE64.fullmatch(text) else None


def _decode(text: str) -> bytes | None:
    """Decode base64 of either alphabet, with line feeds or without padding; None if it is none."""
    plain = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    if len(plain) % 4 == 1:
        plain = plain[:-1]
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


@cache
def _marks() -> tuple[Callable[[bytes], bool | str], ...]:
    """Pillow's own tests of a file's first bytes, for formats with a mark that no text begins with."""
    PIL.Image.init()
    return tuple(
        accept
        for kind, (_, accept) in PIL.Image.OPEN.items()
        if accept is not None and kind not in _NO_PICTURES | _WEAK_MARKS
    )

"""Which pictures an entry names, under whatever key, and that none of them is overlooked.

An entry that names a picture and is kept without it would be learnt as text alone, in silence. So everything in an
entry that looks like a picture or a video counts: a key, a file's name, an address, base64, stored bytes. One that is
not read is the sample's error. An entry without any is text: none, or an empty one (``"image": null``), says so.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.data.images.load import ImageBytes, ImageFile
from vlm_distill_cache.data.images.recognise import (
    base64_picture,
    extension_of,
    is_picture,
    may_name_file,
    names_picture,
    names_sound,
    names_video,
)
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.data.sources.markers import take_markers
from vlm_distill_cache.data.sources.printed import printed

# Whatever stands under these is the picture; names are compared in lower case with underscores.
_PLAIN_KEYS = ("image", "images")
_KNOWN = (
    "image_path image_paths image_file image_files image_filename image_filenames image_url image_urls image_bytes "
    "image_base64 image_b64 image_data img imgs img_path img_paths img_file img_url picture pictures pic pics photo "
    "photos"
)
_KNOWN_KEYS = frozenset(_KNOWN.split())
_FILE_KEYS = frozenset({"file_name", "filename", "file_names", "filenames"})  # of pictures, if of nothing else
# Those of them that may name the same picture in another place, or hold it once more, whatever they say.
_PLACES = ("path", "paths", "file", "files", "filename", "filenames", "url", "urls", "bytes", "base64", "b64", "data")
VIDEO_KEYS = frozenset({"video", "videos", "video_path", "video_paths", "video_file", "video_url", "mp4", "webm"})
_SOUND_KEYS = frozenset(
    "audio audios audio_path audio_paths audio_file audio_files audio_url audio_urls audio_bytes wav mp3 flac".split()  # noqa: SIM905
)
_NUMBERED_KEY = re.compile(
    r"(image|img|picture|pic|photo)_?(\d{1,3}|[ab])|(first|second|left|right)_(image|img|picture)"
)
_MARKED = re.compile(r"<image_?(\d{1,4})>")
# What the entry is called, and what is answered: no picture that is asked about is named there.
_ANSWERS = (
    "answer answers multiple_choice_answer caption captions response completion output chosen rejected id sample_id "
    "question_id key uid uuid"
)
_ANSWER_KEYS = frozenset(_ANSWERS.split())
# Texts, about which `data.sources.conversations` decides.
_TEXTS = (
    "messages conversations conversation question questions text texts query prompt instruction input content value"
)
TEXT_KEYS = frozenset(_TEXTS.split()) | _ANSWER_KEYS
# Texts too, unless they are nothing but a picture's file.
SYSTEM_KEYS = frozenset({"system", "system_prompt", "system_message", "system_instruction", "system_instructions"})
_MOSTLY_TEXT = SYSTEM_KEYS | {"problem", "solution", "rejected_response", "history"}
# Who speaks, by the name of a role; and, in a round, by the key.
USER_NAMES = ("user", "human")
MODEL_NAMES = ("assistant", "gpt", "chatgpt", "model", "bot", "bard", "bing")
_ROUND_ANSWERS = frozenset({*MODEL_NAMES, "answer", "response"})
_HISTORY_PAIR = re.compile(r"history\[\d+\]")
_PICTURE_WORD = re.compile(
    r"(images?|imgs?|pictures?|pics?|photos?|pixels?|screenshots?|thumbnails?|frames?|figures?|(?P<video>videos?|youtube))"
    r"(\d*|paths?|files?|urls?|names?|ids?|bytes|data|base64|b64|lists?|uris?|srcs?|sources?|filenames?)"
)
_COUNTING = frozenset("n num number count total has with is requires needs width height size tokens".split())  # noqa: SIM905
_NONE_WORDS = frozenset({"no", "without"})
# A key with one of these describes a picture, or holds it in another size; with one of the others it holds another one.
_DESCRIBING = (
    "name names id ids key keys hash md5 sha sha1 sha256 url urls uri uris link links page src thumbnail thumbnails thumb "
    "thumbs preview previews icon icons decoded encoded resized"
)
_SAME = frozenset(_DESCRIBING.split())
_OTHER = frozenset("mask masks depth depthmap segmentation heatmap sketch overlay".split())  # noqa: SIM905
_RATING = frozenset("rating ratings score scores min max mean correspondence similarity quality".split())  # noqa: SIM905
_NUMBERS = re.compile(r"(?:[\d\s\[\].,+-]|null|None|nan)*")  # as a table of texts holds them
_VALUE_KEYS = ("bytes", "path", "file_name", "filename", "image", "image_url", "url", "source", "base64", "data")
_TYPES = frozenset({"image", "image_url", "input_image", "image_path", "video", "video_url", "input_video"})
_NAMED = (("video", names_video), ("sound", names_sound), ("picture", names_picture))
MAPPING = (dict, Mapping)  # the first is found at once
_ZEROS = ("0", "0.0", "false", "no", "none")
_FILES_KEYS = _KNOWN_KEYS | _FILE_KEYS | VIDEO_KEYS | {*_PLAIN_KEYS, "frames", "video_frames"}
_LONGEST_PATH = 4096
_LONGEST_LIST = 2**20  # characters


@runtime_checkable
class _Stored(Protocol):
    """A picture whose bytes are read when they are needed, as those of a table."""

    def read(self) -> bytes: ...


def named_pictures(
    entry: Mapping[str, Any],
    picture_keys: frozenset[str] = frozenset(),
    *,
    plain_only: bool = False,
    video_keys: Collection[str] | None = None,
) -> list[Any]:
    """What an entry gives as its pictures, each as it stands there; for `open_picture`.

    ``image`` and ``images`` come first, and pictures with a number; else a key that is known to hold a picture, else
    any whose value looks like one. The same picture under two keys counts once, and an address is passed over where
    a file is named.

    Args:
        picture_keys: Further keys that are known to hold a picture.
        plain_only: Look at those that come first alone.
        video_keys: Keys of the entry's videos, which are read elsewhere; None: none is read.

    Raises:
        SampleError: Keys that are not numbered name different pictures: their order cannot be told. Or there is a video
            that is not read, or a sound, whatever else there is.
    """
    plain: dict[str, list[Any]] = {}
    known: dict[str, list[Any]] = {}
    guessed: dict[str, list[Any]] = {}
    for key, value in entry.items():
        name = normal_key(key)
        is_text = name in TEXT_KEYS and key not in picture_keys and isinstance(value, str | list | tuple)
        is_text = is_text or (name in _MOSTLY_TEXT and isinstance(value, str) and len(value.split()) > 1)
        if is_text or says_none(value) or name in ("rejected_images", "rejected_videos"):  # ms-swift's: not learnt
            continue
        if video_keys is not None and key in video_keys:
            continue
        if name in VIDEO_KEYS and not plain_only:
            _refuse(key, value, "video")
        if name in _SOUND_KEYS and not plain_only:
            _refuse(key, value, "sound")
        if name in _PLAIN_KEYS or _NUMBERED_KEY.fullmatch(name):
            plain[key] = _listed(value)
        elif name in _KNOWN_KEYS or key in picture_keys or (name in _FILE_KEYS and _has_no_extension(value)):
            known[key] = _listed(value)
        elif all(map(looks_like_picture, _listed(value))):
            guessed[key] = _listed(value)
    plain = dict(sorted(plain.items(), key=lambda item: _number_of(item[0])))
    if plain_only:
        return _all_of(plain)
    if plain:
        _refuse_further(plain, {**known, **guessed}, picture_keys)
        return _all_of(plain)
    local = [{key: found[key] for key in found if not all(map(is_address, found[key]))} for found in (known, guessed)]
    for found in (*local, known, guessed):  # files first, then addresses
        different = distinct(found)
        if len(different) > 1:
            raise SampleError(
                f"{' and '.join(map(repr, sorted(different)))} name different pictures, whose order cannot be told; put those "
                "that the sample is about under 'images'"
            )
        for values in different.values():
            _refuse_further(found, guessed, picture_keys)
            return values
    return []


def _all_of(found: Mapping[str, list[Any]]) -> list[Any]:
    return [item for values in distinct(found).values() for item in values]


def _refuse_further(
    found: Mapping[str, list[Any]], others: Mapping[str, list[Any]], picture_keys: Collection[str]
) -> None:
    """Refuse a picture beside those that were found which is not one of them: without it the sample means something else.

    Other names of one picture, addresses and thumbnails are passed over.
    """
    for key, values in others.items():
        if key in found or _names_the_same(key):
            continue
        pictures = [content_of(value) for given in found.values() for value in given]
        further = [item for value in values if (item := content_of(value)) is not None and not is_address(item)]
        further = [item for item in further if not any(are_same(item, picture) for picture in pictures)]
        if further and _is_another(key, further, pictures, typed=key in picture_keys):
            raise SampleError(
                f"{key!r} holds another picture ({brief(further[0])}) beside {next(iter(found))!r}; list under 'images' those "
                f"that the sample is about, in order, or remove {key!r}"
            )


def _names_the_same(key: str) -> bool:
    """Whether a key, by its name, holds the picture of another key once more, or says something about it."""
    name = normal_key(key)
    words = name.split("_")
    ends = {match[3] for word in words if (match := _PICTURE_WORD.fullmatch(word))}
    is_place = name in _FILE_KEYS or (name in _KNOWN_KEYS and words[-1] in _PLACES)
    return is_place or not _SAME.isdisjoint({*words, *ends})


def _is_another(key: str, further: Sequence[Any], pictures: Sequence[Any], *, typed: bool) -> bool:
    """Whether pictures that are not those that were found are further ones, by what they are and by their key."""
    name = normal_key(key)
    if name in _KNOWN_KEYS:  # a file and stored bytes may be the same
        return any(isinstance(item, str) == isinstance(picture, str) for item in further for picture in pictures)
    is_stored = not all(isinstance(item, str) for item in further)
    return is_stored or typed or bool(_picture_word(key)) or not _OTHER.isdisjoint(name.split("_"))


def is_made(name: str) -> bool:
    """Whether a name says that a picture is made of another one: a mask, a thumbnail."""
    words = set(normal_key(name).split("_"))
    return not words.isdisjoint(_OTHER | (_SAME - {"name", "names", "id", "ids", "key", "keys", "page", "src"}))


def content_of(value: Any) -> Any:
    """A picture's file, or its bytes; None if it says that there is none."""
    while isinstance(value, Mapping):
        value = next((value[key] for key in _VALUE_KEYS if not says_none(value.get(key))), None)
    if isinstance(value, str):
        data = base64_picture(value)
        return value.strip().replace("\\", "/").removeprefix("./") if data is None else data
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    return value.read() if isinstance(value, _Stored) else value


def are_same(one: Any, other: Any) -> bool:
    """Whether one of two values names the same file as the other, or holds the same."""
    return _same([one], [other]) or _same([other], [one])


def distinct(found: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Pictures by key, without the keys that name those of another one once more, in fewer words."""
    if len(found) <= 1:
        return dict(found)
    kept: dict[str, list[Any]] = {}
    for key, values in sorted(found.items(), key=lambda item: -_length(item[1])):
        if not any(_same(values, others) for others in kept.values()):
            kept[key] = values
    return {key: found[key] for key in found if key in kept}


def refuse_unread(entry: Mapping[str, Any]) -> None:
    """Refuse an entry of which no picture was read, but which speaks of one, or of a video, anywhere but in its answers.

    Raises:
        SampleError: Says where.
    """
    waiting: list[tuple[str, Any, bool]] = [("", entry, False)]
    while waiting:
        place, value, is_text = waiting.pop()
        if says_none(value):
            continue
        if isinstance(value, MAPPING):
            kind = value.get("type")
            if isinstance(kind, str) and kind.lower() in _TYPES:
                _refuse(f"{place}.type".lstrip("."), kind, "video" if "video" in kind.lower() else "picture")
            answers = _answers_in(value, is_text=is_text) if place else _ANSWER_KEYS
            for key, item in value.items():
                name = normal_key(key)
                if name in answers or (not place and name in ("solution", "rejected_response")):
                    continue
                inner = f"{place}.{key}".lstrip(".")
                word = _picture_word(key)
                if word and not says_none(item) and not _counts_none(key, item) and not _rates(key, item):
                    _refuse(inner, item, word)
                says = name in TEXT_KEYS or name in _MOSTLY_TEXT or (is_text and name in USER_NAMES)
                waiting.append((inner, item, says))
        elif isinstance(value, list | tuple):
            if _HISTORY_PAIR.fullmatch(place):
                value = value[:1]  # its question
            waiting += [(f"{place}[{position}]", item, is_text) for position, item in enumerate(value)]
        elif isinstance(value, str):
            # A text may end in a file's name; only a line that is nothing else names the file.
            lines = [line for line in value.split("\n") if len(line.split()) == 1] if is_text else [value]
            for line in lines:
                for kind, names in _NAMED if may_name_file(line) else ():
                    if names(line):
                        _refuse(place, line, kind)
            if take_markers(value)[2]:
                _refuse(place, value, "picture")
        elif looks_like_picture(value):
            _refuse(place, value, "picture")


def _answers_in(message: Mapping[str, Any], *, is_text: bool) -> Collection[str]:
    """The keys of a message, or of a round, under which an answer stands."""
    roles = [str(message[key]).lower() for key in ("role", "from") if message.get(key) is not None]
    if not roles and is_text:
        return _ROUND_ANSWERS
    return {"content", "value"} if any(role in MODEL_NAMES for role in roles) else ()


def _refuse(place: str, value: Any, kind: str) -> None:
    if kind == "picture":
        raise SampleError(
            f"{place!r} names a picture ({brief(value)}), but none could be read; name its file under 'image', or remove "
            "the key if the sample is text alone"
        )
    remedy = "remove the key if the sample is not about it"
    if kind == "video":
        raise SampleError(
            f"{place!r} names a video ({brief(value)}), but none could be read; name its file under 'video', or {remedy}"
        )
    raise SampleError(f"{place!r} names a {kind} ({brief(value)}); only pictures and videos are read: {remedy}")


def speak_of_pictures(keys: Iterable[object]) -> bool:
    """Whether one of some keys is called like a picture or a file."""
    return any(_picture_word(key) == "picture" or normal_key(key) in _FILE_KEYS for key in keys)


def says_text_only(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has a key for a picture and says that there is none."""
    return any(_picture_word(key) and (says_none(value) or _counts_none(key, value)) for key, value in entry.items())


def files_in(key: object, text: str) -> list[Any] | None:
    """The files that a text under the key of pictures or videos lists; None if it is no list of several.

    It is one as JSON or Python prints it, or if commas, semicolons, bars or line ends part it into names of such files.
    """
    if normal_key(key) not in _FILES_KEYS or len(text) > _LONGEST_LIST or text.lstrip().lower().startswith("data:"):
        return None
    if text.lstrip().startswith("["):
        found = printed(text)
        return found if isinstance(found, list) else None
    for sign in (sign for sign in ",;|\n" if sign in text):
        names = [name.strip() for name in text.split(sign) if name.strip()]
        if len(names) > 1 and all(names_picture(name) or names_video(name) for name in names):
            return names
    return None


def says_none(value: Any) -> bool:
    """Whether a value says that there is no picture: null, false, or empty."""
    if value is None or value is False:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list | tuple | bytes):
        return not value
    return isinstance(value, MAPPING) and all(item is None for item in value.values())


def key_numbers(entry: Mapping[str, Any]) -> list[int]:
    """The numbers of the keys that hold pictures (``image_1``), rising."""
    found = [(_NUMBERED_KEY.fullmatch(normal_key(key)), value) for key, value in entry.items()]
    return sorted(
        int(match[2]) for match, value in found if match and match[2] and match[2].isdigit() and not says_none(value)
    )


def _number_of(key: object) -> int:
    """Where the picture under a key stands among those of others: columns may be sorted by their names, 10 before 2."""
    match = _NUMBERED_KEY.fullmatch(normal_key(key))
    word = match and (match[2] or match[3])
    return -1 if not word else int(word) if word.isdigit() else int(word in ("b", "second", "right"))


def open_picture(value: Any, root: Path, *, where: str = "in the data", kind: str = "image") -> ImageSource:
    """Where the picture that an entry gives is to be read.

    Args:
        value: A path below ``root`` or an absolute one, ``file://``, base64 with or without ``data:``, bytes, or an
            object that holds one of them.
        where: What errors call a picture that stands in the data itself.
        kind: What errors call it: a video's file is found in the same way.

    Raises:
        SampleError: It is none of them, or would have to be downloaded.
    """
    while isinstance(value, Mapping):
        filled = [value[key] for key in _VALUE_KEYS if not says_none(value.get(key))]
        filled = filled or [item for item in value.values() if len(value) == 1 and isinstance(item, str)]
        if not filled:
            break
        value = filled[0]
    if isinstance(value, bytes | bytearray):
        return ImageBytes(bytes(value), where)
    if not isinstance(value, str) or not value.strip():
        raise SampleError(f"{_a(kind)} must be given by its path, as bytes or as base64, got {brief(value)}")
    if (data := base64_picture(value)) is not None:
        return ImageBytes(data, f"{where} (base64)")
    if value.startswith("data:"):
        raise SampleError(f"{kind} {brief(value)} is no base64 picture")
    if value.startswith("file:"):
        return ImageFile(Path(unquote(urlsplit(value).path)), hint="the data names it by this file:// address")
    if "://" in value:
        raise SampleError(f"{kind} {value[:60]!r} is not a file; nothing is downloaded, so store it beside the data")
    if len(value) > _LONGEST_PATH:
        raise SampleError(f"{kind} {brief(value)} ({len(value)} characters) is neither a path nor base64 of a picture")
    return _image_file(value, root, kind)


def _a(kind: str) -> str:
    return f"an {kind}" if kind == "image" else f"a {kind}"


def _image_file(value: str, root: Path, kind: str) -> ImageFile:
    path = Path(value)
    if path.is_absolute():
        return ImageFile(path, hint="the data names it by this absolute path")
    if ".." in path.parts:
        raise SampleError(f"{kind} path {value!r} leaves the image folder; use a path below it or an absolute one")
    # Reasons of failure are kept in the cache: they name no folder of this machine.
    hint = f"paths start from the folder of the data, or from images ({by_make('IMAGES=FOLDER, ')}--images FOLDER)"
    if "\\" in value and ".." not in value and _is_file(root / value.replace("\\", "/")):
        path = Path(value.replace("\\", "/"))  # written on Windows
    return ImageFile(root / path, hint=hint, shown=value)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def image_folder(images: Path | None, path: Path) -> Path:
    """The folder relative image paths start from; `DataError` if ``images`` is given but is no folder."""
    if images is not None and not images.is_dir():
        raise DataError(
            f"image folder {images} does not exist; set images to the folder the paths in {path} start from"
        )
    return path.parent if images is None else images


def brief(value: Any) -> str:
    """A value's type and how it begins, for errors."""
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    return f"{type(value).__name__} {str(value)[:60]!r}"


@lru_cache(1024)  # a file has few keys, and each of them often
def normal_key(key: object) -> str:
    """A key in lower case, its words separated by underscores."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key))
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


@lru_cache(1024)
def _picture_word(key: object) -> str:
    """Whether a key speaks of a ``picture`` or of a ``video``; empty if of neither."""
    for word in normal_key(key).split("_"):
        if found := _PICTURE_WORD.fullmatch(word):
            return "video" if found["video"] else "picture"
    return ""


def _counts_none(key: object, value: Any) -> bool:
    """Whether a key counts pictures (``num_images``) and there are none."""
    words = set(normal_key(key).split("_"))
    return bool(words & _NONE_WORDS) or (bool(words & _COUNTING) and str(value).strip().lower() in _ZEROS)


def _rates(key: object, value: Any) -> bool:
    """Whether a key rates pictures by numbers (FineVision's ``image_correspondence_ratings``)."""
    return bool(_RATING & set(normal_key(key).split("_"))) and all(
        item is None or isinstance(item, int | float) or (isinstance(item, str) and _NUMBERS.fullmatch(item))
        for item in _listed(value)
    )


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Mapping) and value and all(_MARKED.fullmatch(str(key)) for key in value):
        return [value[key] for key in sorted(value, key=lambda key: int(_MARKED.findall(key)[0]))]  # MiniCPM-V's data
    return list(value) if isinstance(value, list | tuple) else [value]


def looks_like_picture(value: Any) -> bool:
    """Whether a value is the name, the address, the bytes or the base64 of a picture."""
    if isinstance(value, str):
        return names_picture(value)
    if isinstance(value, bytes | bytearray):
        return is_picture(bytes(value))
    if isinstance(value, Mapping) and {"bytes", "path"} <= value.keys():  # how `datasets` stores a picture, or a sound
        return any(looks_like_picture(value[key]) for key in ("bytes", "path"))
    return False


def _has_no_extension(value: Any) -> bool:
    return all(isinstance(item, str) and not extension_of(item) for item in _listed(value))


def is_address(value: Any) -> bool:
    """Whether a value is an address of the web."""
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def _same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    pairs: Iterable[tuple[Any, Any]] = zip(values, others, strict=False)
    return len(values) == len(others) and all(
        one == other or (isinstance(one, str) and isinstance(other, str) and f"/{other}".endswith(f"/{one}"))
        for one, other in pairs
    )


def _length(values: Sequence[Any]) -> int:
    return sum(len(value) for value in values if isinstance(value, str))

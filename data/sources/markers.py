"""What stands for a picture or a video inside a text: the markers of all families, and files named in the text itself."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vlm_distill_cache.common.errors import SampleError

IMAGE_MARKER = "<image>"
Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")

_THING = r"(?:image|img|picture)"
# What a family's marker has and a type of a program (`List<Image>`) does not: it stands behind a letter, too.
_NO_CODE = (
    rf"(?=<\||<(?:start|begin|end)_of_{_THING}|<{_THING}[\ _-]?(?:here|placeholder|token|pad|soft_token|context)"
    r"|<image[\ _-]?\d|<im_(?:start|end|patch)>|(?-i:<video>)|<video[\ _-]?(?:here|placeholder|token|pad|\d)"
    r"|<vid?_(?:start|end|patch)>)"
)
_MARKERS = re.compile(
    rf"""(?P<code>```.*?```|`[^`\n]*`)
    |(?P<counted>Picture\ \d+:\ ?)?<img>\s*(?P<file>[^<>\s][^<>\n]*?)\s*</img>      # Qwen-VL
    |<image>(?P<tagged>(?!\./<)[^<>\s]+)</image>
    |\[img\](?P<bulletin>[^\[\]\s]+)\[/img\]
    |!\[(?:[^\[\]\n]|\[[^\[\]\n]*\])*\](?:\((?P<markdown>[^()\n]*(?:\([^()\n]*\)[^()\n]*)*)\)|\[[^\[\]\n]*\])
    |\(?<image>\./</image>\)?                                           # MiniCPM
    |(?<!\w)<image><image></image>                                      # Mantis
    |(?-i:<image>)
    |(?P<closed></image>)
    |(?P<ended></video>)
    |(?:(?<!\w)|(?P<behind>(?<![A-Za-z0-9_])|{_NO_CODE}))(?:        # also behind a word, as in texts without blanks
      </?{_THING}>\s*<{_THING}_?here>\s*</{_THING}>
      |<image>
      |(?P<frame>
        <\|?(?:start_of_|end_of_|begin_of_)?{_THING}[\ _-]?(?:start|end|newline)[\ _-]?\d{{0,4}}\|?>
        |<\|?(?:begin_of_|end_of_){_THING}\|?>
        |<fake_token_around_image>|<im_(?:start|end)>|<\|vision_(?:start|end)\|>|(?-i:\[IMG_(?:BREAK|END)\]))
      |(?:<\|?{_THING}[\ _-]?(?:pad|soft_token|context)\|?>|<im_patch>|<\|vision_pad\|>)+  # one a patch
      |<\|media_pad\|>
      |<\|?(?:start_of_|end_of_|begin_of_)?{_THING}
        (?:[\ _@-]?(?:here|placeholder|token|pad|soft_token|context|start|end|newline)
          |[\ _-]?\#?(?P<number>\d{{1,4}})|(?=\|)|(?<=of_image))[\ _-]?\d{{0,4}}\|?>
      |(?-i:\[IMG\]|\[IMAGE\])
      |(?P<html></?(?:img|picture)>|<{_THING}\s*/>|<img\b[^<>]*?\bsrc\s*=\s*["']?(?P<source>[^"'\s<>]+)[^<>]*>)
      |(?P<around>
        <\|?vid(?:eo)?[\ _-]?(?:start|end)\|?>|<vi_(?:start|end)>|<\|?(?:start|begin|end)_of_video\|?>)
      |(?P<video><video>(?P<clip>[^<>\s]+)</video>
        |<video>\s*<(?:video|{_THING})_?(?:here)?>\s*</video>           # TimeChat
        |(?:<\|?video[\ _-]?pad\|?>|<vid_patch>)+
        |<\|?video(?:[\ _@-]?(?:here|placeholder|token))?(?:[\ _-]?(?P<video_number>\d{{1,4}}))?\|?>|<vila/video>)
      |(?P<player><video\s[^<>]*>)
    )""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
# Words in angle brackets, or in braces with a number, however they are written: ``<image:1>``, ``&lt;image&gt;``, ``{image#1}``.
_MEDIUM = r"(?:images?|imgs?|im|pictures?|pics?|photos?|videos?|vid?|clips?|frames?|media)"
_UNREAD = re.compile(
    rf"""(?:<|＜|&lt;)[\s|｜/]*(?:(?:start|begin|end)[\s_-]?of[\s_-]?)?{_MEDIUM}
      (?:[\s_:\#=@-]*(?:start|end|begin|patch|tokens?|here|pad|placeholder|sentinel|id|no|index|number|sep|col|row))?
      [\s_:\#=@-]*(?:\d{{1,4}}|[A-Za-z])?[\s|｜/\\]*(?:>|＞|&gt;)
    |<img\b[^<>]*\bsrc\s*=[^<>]*>
    |(?<![\w\\{{])\{{{{1,2}}\s*{_MEDIUM}[\s_:\#-]*\d{{1,4}}\s*\}}{{1,2}}""",
    re.VERBOSE | re.IGNORECASE,
)
_TITLED = re.compile(r"""(?:<(?P<angled>[^<>]*)>|(?P<plain>.*?))(?:\s+(?:"[^"]*"|'[^']*'|=\d*x\d*))?""", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What stands for a picture or a video, at its place in a question.

    Attributes:
        kind: Which of them, as it is written; a picture's marker may stand for a video where there are no pictures.
        value: What it names itself, for `data.sources.pictures.open_picture`; None: one that the entry gives.
        number: Which one that the entry gives, as it is written; None: the next.
        alone: The text that it leaves behind where the one picture of a sample stands in front, whatever its place.
        placed: The text that stands before it where it keeps its place.
        is_part: It is a part of a message, which is one picture; markers in a text may repeat for one.
    """

    kind: Kind = "image"
    value: Any = None
    number: int | None = None
    alone: str = ""
    placed: str = ""
    is_part: bool = False


Piece = str | Shown


@dataclass(frozen=True)
class _Frame:
    """A sign that only frames what is shown; ``alone``: as of `Shown`.

    Attributes:
        beside: What it frames, where it is text beside nothing such; empty: it is a picture's marker there.
        text: As it is written.
    """

    alone: str = ""
    beside: tuple[Kind, ...] = ()
    text: str = ""


def read_markers(question: str, parts: Sequence[tuple[int, Shown]] = ()) -> tuple[tuple[Piece, ...], bool]:
    """Cut a question into texts and what it shows between them.

    Signs of a family that only frame a marker (``<im_start><image><im_end>``) are one with it; without one, those of a
    picture are a marker, and those of a video text. In code only the plain marker is one.

    Args:
        parts: What else it shows, and at which character: pictures that are parts of a message, in order. A line feed in
            front of one that leaves it behind (`Shown.alone`) is its own.

    Returns:
        Texts and what is shown; and whether HTML inside a line speaks of a picture, which stays in the text.

    Raises:
        SampleError: It has a video's tag of HTML, whose file is not read.
    """
    if not parts and not _may_mark(question):
        return ((question,) if question else ()), False
    pieces: list[Piece | _Frame] = []
    waiting = list(parts)
    mentions, at = False, 0

    def take_text(end: int) -> None:
        nonlocal at
        while waiting and waiting[0][0] <= end:
            offset, shown = waiting.pop(0)
            text = question[at : max(offset, at)]
            if shown.alone and not text.endswith(shown.alone):
                shown = replace(shown, alone="")
            pieces.append(text.removesuffix(shown.alone) if shown.alone else text)
            pieces.append(shown)
            at = max(offset, at)
        pieces.append(question[at:end])
        at = end

    for match in _MARKERS.finditer(question) if _may_mark(question) else ():
        if match["player"]:
            raise SampleError(
                f"a question has {match['player'][:60]!r}, a page's video, which is not read: write <video> in its place and "
                "give its file under 'video'"
            )
        if match["html"] and _is_inside(question, match):
            mentions = True
            continue
        take_text(match.start())
        at = match.end()
        if match["code"] is not None:
            for number, text in enumerate(match["code"].split(IMAGE_MARKER)):
                pieces += ([Shown()] if number else []) + [text]
        elif match["frame"] or match["closed"]:
            pieces.append(_Frame(_left_behind(match)))
        elif match["around"] or match["ended"]:
            pieces.append(_Frame(beside=("video",) if match["ended"] else KINDS, text=match[0]))
        else:
            pieces.append(_shown(match))
    take_text(len(question))
    return _without_frames(pieces), mentions


def _may_mark(text: str) -> bool:
    """Whether a text has one of the signs that markers begin with."""
    return "<" in text or "[" in text


def _is_inside(question: str, match: re.Match[str]) -> bool:
    """Whether a sign stands behind text of its line."""
    return bool(question[: match.start()].rpartition("\n")[2].strip())


def _left_behind(match: re.Match[str]) -> str:
    """What the marker of one picture leaves behind a word: itself, as caches of such data have it."""
    return "" if match["behind"] is None else match[0]


def _shown(match: re.Match[str]) -> Shown:
    if match["video"]:
        number = match["video_number"]
        return Shown(kind="video", value=match["clip"], number=int(number) if number else None)
    values = [match[name] for name in ("file", "tagged", "bulletin", "source") if match[name]]
    if match["markdown"] and (found := _TITLED.fullmatch(match["markdown"].strip())):
        values = [found["angled"] or found["plain"]]
    number = match["number"]
    value = values[0] if values else None
    alone = _left_behind(match)
    return Shown(value=value, number=int(number) if number else None, alone=alone, placed=match["counted"] or "")


def _without_frames(pieces: Sequence[Piece | _Frame]) -> tuple[Piece, ...]:
    """Drop the signs that frame something shown, beside it; of a run of them beside nothing the first is a marker."""
    found: list[Piece] = []
    run: list[Piece | _Frame] = []  # with nothing but blanks between

    def close() -> None:
        kinds = {piece.kind for piece in run if isinstance(piece, Shown)}
        marked = bool(kinds)
        behind = ""  # what signs in front of a marker leave
        for piece in run:
            if isinstance(piece, _Frame) and piece.beside:
                found.extend([] if kinds.intersection(piece.beside) else [piece.text])
            elif isinstance(piece, _Frame):
                if not marked:
                    found.append(Shown(alone=piece.alone))
                    marked = True
                else:
                    behind += piece.alone
            elif isinstance(piece, Shown) and behind:
                found.append(replace(piece, alone=behind + piece.alone))
                behind = ""
            else:
                found.append(piece)
        run.clear()

    for piece in pieces:
        if isinstance(piece, str) and piece.strip():
            close()
            found.append(piece)
        elif piece != "":
            run.append(piece)
    close()
    return tuple(found)


def without_markers(pieces: Sequence[Piece]) -> str:
    """The text of a question whose one picture stands in front, wherever it is marked."""
    return "".join(piece if isinstance(piece, str) else piece.alone for piece in pieces).strip()


def unread_sign(text: str) -> str:
    """What in a text, outside of code, looks like the marker of a picture or video and is none that is read; empty: nothing."""
    found = _UNREAD.search(_CODE.sub("", text))
    return found[0] if found else ""


def marker_in(text: str) -> str:
    """The first marker of a family in a text, outside of code; empty: there is none. HTML and Markdown are text."""
    texts = ("code", "html", "markdown", "bulletin", "player", "ended")
    return next(
        (match[0] for match in _MARKERS.finditer(text) if not any(match[name] is not None for name in texts)), ""
    )


def numbers_in(pieces: Sequence[Piece]) -> set[int]:
    """The numbers of what a question shows."""
    return {piece.number for piece in pieces if isinstance(piece, Shown) and piece.number is not None}


def take_markers(question: str) -> tuple[str, list[str], int]:
    """Take what stands for one picture out of a text.

    Returns:
        The text without it; the files that it names (``<img>FILE</img>``, Markdown, HTML); and how many pictures it
        speaks of, where markers without a number are all of one picture. In code only the plain marker is one; HTML
        inside a line speaks of a picture and stays.

    Raises:
        SampleError: It speaks of a video.
    """
    if not _may_mark(question):
        return question.strip(), [], 0
    pieces, mentions = read_markers(question)
    shown = [piece for piece in pieces if isinstance(piece, Shown)]
    if any(one.kind == "video" for one in shown):
        raise SampleError("a text has the marker of a video, but only pictures are read there; give frames as samples")
    files = [one.value for one in shown if one.value is not None]
    return without_markers(pieces), files, max(len(numbers_in(pieces)), int(bool(shown) or mentions))

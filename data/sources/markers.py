"""What stands for a picture inside a text: the markers of all families, and pictures named in the text itself."""

import re

from vlm_distill_cache.common.errors import SampleError

IMAGE_MARKER = "<image>"

_THING = r"(?:image|img|picture)"
_MARKERS = re.compile(
    rf"""(?P<code>```.*?```|`[^`\n]*`)
    |(?:Picture\ \d+:\ ?)?<img>\s*(?P<file>[^<>\s][^<>\n]*?)\s*</img>      # Qwen-VL
    |<image>(?P<tagged>(?!\./<)[^<>\s]+)</image>
    |\[img\](?P<bulletin>[^\[\]\s]+)\[/img\]
    |!\[(?:[^\[\]\n]|\[[^\[\]\n]*\])*\](?:\((?P<markdown>[^()\n]*(?:\([^()\n]*\)[^()\n]*)*)\)|\[[^\[\]\n]*\])
    |\(?<image>\./</image>\)?                                           # MiniCPM
    |(?-i:</?image>)
    |(?<!\w)(?:
      </?{_THING}>\s*<{_THING}_?here>\s*</{_THING}>
      |</?image>
      |<\|?(?:start_of_|end_of_|begin_of_)?{_THING}
        (?:[\ _-]?(?:here|placeholder|token|pad|soft_token|context|start|end|newline)
          |[\ _-]?\#?(?P<number>\d{{1,4}})|(?=\|)|(?<=of_image))[\ _-]?\d{{0,4}}\|?>
      |(?:<fake_token_around_image>|<im_(?:start|end|patch)>|<\|media_pad\|>|<\|vision_(?:start|end|pad)\|>)
      |(?-i:\[IMG(?:_BREAK|_END)?\]|\[IMAGE\])
      |(?P<html></?(?:img|picture)>|<{_THING}\s*/>|<img\b[^<>]*?\bsrc\s*=\s*["']?(?P<source>[^"'\s<>]+)[^<>]*>)
      |(?P<video><\|?video(?:[\ _-]?(?:here|placeholder|token|pad))?[\ _-]?\d{{0,4}}\|?>|<video\s[^<>]*>|<vila/video>)
    )""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_TITLED = re.compile(r"""(?:<(?P<angled>[^<>]*)>|(?P<plain>.*?))(?:\s+(?:"[^"]*"|'[^']*'|=\d*x\d*))?""", re.DOTALL)


def take_markers(question: str) -> tuple[str, list[str], int]:
    """Take what stands for pictures out of a question.

    Returns:
        The question without it; the files that it names (``<img>FILE</img>``, Markdown, HTML); and how many pictures it
        speaks of, where markers without a number are all of one picture. In code only the plain marker is one; HTML
        inside a line speaks of a picture and stays.

    Raises:
        SampleError: It speaks of a video.
    """
    plain = question.replace(IMAGE_MARKER, "")
    speaks = len(plain) < len(question)
    if not any(sign in plain for sign in "<[!"):
        return plain.strip(), [], int(speaks)
    files: list[str] = []
    numbers: set[str] = set()

    def take(match: re.Match[str]) -> str:
        nonlocal speaks
        if match["video"]:
            raise SampleError(
                f"a question has {match['video'][:60]!r}, but only pictures are read; give frames as samples"
            )
        if match["code"] is not None:
            return match["code"].replace(IMAGE_MARKER, "")
        speaks = True
        if match["html"] and question[: match.start()].rpartition("\n")[2].strip():
            return match[0]  # inside a sentence
        named = [match[name] for name in ("file", "tagged", "bulletin", "source") if match[name]]
        if match["markdown"] and (found := _TITLED.fullmatch(match["markdown"].strip())):
            named = [found["angled"] or found["plain"]]
        files.extend(named)
        if match["number"]:
            numbers.add(match["number"])
        return ""

    text = _MARKERS.sub(take, question).strip()
    return text, files, max(len(numbers), int(speaks))

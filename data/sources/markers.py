"""What stands for a picture inside a text: the markers of all families, and pictures named in the text itself."""

import re

from vlm_distill_cache.common.errors import SampleError

IMAGE_MARKER = "<image>"

_THING = r"(?:image|img|picture|photo)"
_MARKERS = re.compile(
    rf"""(?P<code>```.*?(?:```|\Z)|`[^`\n]*`)
    |(?:Picture\ \d+:\ ?)?<img>\s*(?P<file>[^<>\s][^<>\n]*?)\s*</img>      # Qwen-VL
    |<image>(?P<tagged>[^<>\s]+)</image>
    |!\[[^\]\n]*\]\(\s*<?(?P<markdown>[^\s()<>]+)>?(?:\s+"[^"\n]*")?\s*\)
    |<{_THING}>\s*<image_?here>\s*</{_THING}>
    |</?image>
    |<\|?(?:start_of_|end_of_|begin_of_)?{_THING}
      (?:[\ _-]?(?:here|placeholder|token|pad|soft_token|context)|[\ _-]?(?P<number>\d{{1,4}})|(?=\|)|(?<=of_image))
      [\ _-]?\d{{0,4}}\|?>
    |<\|vision_(?:start|end|pad)\|>
    |(?<!\w)(?-i:\[IMG\]|\[IMAGE\])
    |(?P<html></?(?:img|picture|photo)>|<{_THING}\s*/>)                     # a marker, or what a question is about
    |(?P<video><\|?video(?:[\ _-]?(?:here|placeholder|token|pad))?[\ _-]?\d{{0,4}}\|?>)
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)


def take_markers(question: str) -> tuple[str, list[str], int]:
    """Take what stands for pictures out of a question.

    Returns:
        The question without it; the files that it names (``<img>FILE</img>``, Markdown); and how many pictures it
        speaks of, where markers without a number are all of one picture. In code only the plain marker is one;
        ``<img>`` inside a line speaks of a picture and stays.

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
            raise SampleError(f"a question has {match['video']}, but only pictures are read; give frames as samples")
        if match["code"] is not None:
            return match["code"].replace(IMAGE_MARKER, "")
        speaks = True
        if match["html"] and question[: match.start()].rpartition("\n")[2].strip():
            return match[0]  # of HTML, inside a sentence
        if file := match["file"] or match["tagged"] or match["markdown"]:
            files.append(file)
        elif match["number"]:
            numbers.add(match["number"])
        return ""

    text = _MARKERS.sub(take, question).strip()
    return text, files, max(len(numbers), int(speaks))

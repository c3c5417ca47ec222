"""A tokenizer file tried in a process of its own: run by `tokenizer_trial` with its path and limits.

Imports nothing of ours and no library but tokenizers, so that it starts soon and has memory to limit. What it tries are
runs of one character, on which patterns that search back and forth take longest, of those that the file's patterns name,
too, and a short text; a step that makes texts longer, or ever longer, shows on any of them.
"""

import json
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer

PROBE = "USER: What's in  it?\n(A) 3 RED px\tna\u00efve e\u0301t\u00e9 \u4e2d\u6587 \U0001f642 x_1 ASSISTANT: no"
RUN, NAMED_RUN = 10_000, 1_000  # characters
MAX_NAMED = 200  # characters of patterns that are tried
_PATTERN = re.compile(r'"(?:Regex|String)"\s*:\s*("(?:[^"\\]|\\.)*")')


def texts_for(described: str) -> list[str]:
    """What a tokenizer of this description is tried on."""
    named = dict.fromkeys("".join(json.loads(found) for found in _PATTERN.findall(described)))
    runs = [character * RUN for character in ("a", "A", "0", " ", "\n", "-", "\u4e2d", "a b1")]
    runs += [character * NAMED_RUN for character in list(named)[:MAX_NAMED]]
    return [PROBE, *(f"{end}{run}{end}" for run in runs for end in ("", "\x01!"))]


def main(path: str, memory: str, seconds: str) -> None:
    """Read the file and encode the texts; the reason if it fails is the last line written."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
    with suppress(OSError, ValueError):  # macOS has the name and sets nothing
        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    try:
        described = Path(path).read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(described)
        for text in texts_for(described):
            tokenizer.encode(text.encode(errors="ignore").decode())
    except BaseException as error:  # noqa: BLE001 - a panic of the library's is no Exception
        sys.stdout.write(str(error)[:2000] or type(error).__name__)
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])

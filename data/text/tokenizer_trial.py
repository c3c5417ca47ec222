"""Tokenizer files are programs, often of strangers: each is tried in a process of its own, under limits, before it is read.

A pattern may search for days and a replacement may make a text ten times longer, six times over; both are to be seen on
short texts. `tokenizer_program` reads some, with at most `MEMORY` beside what the file takes and `SECONDS` of processor
time. That takes a tenth of a second, a second for a file of 24 MB; a file that passed is noted and not tried again.

macOS does not enforce the limit on memory.
"""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.files.atomic import read_bounded
from vlm_distill_cache.common.files.notes import add_notes, notes_file, read_notes
from vlm_distill_cache.common.printing import one_line

_PROGRAM = Path(__file__).with_name("tokenizer_program.py")
MAX_BYTES = 256 << 20  # published ones have up to 34 MB
MEMORY = 1 << 30
MEMORY_PER_BYTE = 32
SECONDS = 5
BYTES_PER_SECOND = 4 << 20
_KIND = "tokenizers-1"  # to be raised when more is tried than before: earlier notes are worth nothing then
_TEXTS = "plain texts of 10,000 characters"
_passed: set[str] = set()  # by this process, whether or not the notes can be written


def is_failure(error: BaseException) -> bool:
    """Whether it is an error of what was called; a panic of the tokenizers package is one, and no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def try_tokenizers(folder: Path) -> None:
    """Try each tokenizer file that the library may take from a folder.

    Raises:
        ModelError: If one takes more time or memory than any needs, or the tokenizers package fails on it.
        CacheFormatError: If one is larger than `MAX_BYTES`.
    """
    for path in sorted(folder.glob("tokenizer*.json")):  # the settings may name tokenizer.4.0.json, for newer versions
        if path.name != "tokenizer_config.json" and path.is_file():
            _try(path)


def _try(path: Path) -> None:
    real = path.resolve()  # in the hub's cache it is a link
    data = read_bounded(real, max_bytes=MAX_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    notes = notes_file(_KIND)
    if digest in _passed or digest in read_notes(notes):
        return
    memory, seconds = MEMORY + MEMORY_PER_BYTE * len(data), SECONDS + len(data) // BYTES_PER_SECOND
    del data
    tried = subprocess.run(
        [sys.executable, "-P", _PROGRAM, real, str(memory), str(seconds)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
        check=False,
    )
    if tried.returncode == 0:
        _passed.add(digest)
        add_notes(notes, [digest])
        return
    if tried.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        why = f"it takes more than {seconds} seconds of processor time on {_TEXTS}"
    elif tried.returncode < 0:
        why = f"it ends its process on {_TEXTS} (more than {memory >> 20} MiB of memory, or a fault)"
    else:
        why = f"it cannot be read or fails on {_TEXTS}: {one_line(tried.stdout.decode(errors='replace'), limit=300)}"
    raise ModelError(
        f"{path}: no usable tokenizer: {why}; expected tokenizer.json as the tokenizer's save_pretrained writes it: look at its "
        "normalizer and pre_tokenizer, download it again, or take another checkpoint or cache"
    )

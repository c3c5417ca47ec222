"""What was looked through once is noted in a folder of the user's, so that it need not be again.

A note is a digest, in a file named by what was looked for. The folder is never beside what was looked through, where its
author could have written the note.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import read_bounded

FOLDER_VARIABLE = "VLM_DISTILL_VERIFIED_DIR"
MAX_BYTES = 64 << 20  # a million digests
_noting = True
_log = logging.getLogger(__name__)


def notes_file(name: str) -> Path:
    """Where the notes of one kind lie, absolute."""
    if given := os.environ.get(FOLDER_VARIABLE):
        folder = Path(given)
    else:  # expanduser leaves the ~ where a user has no home, as in some containers
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - Path's raises then
        folder = Path(caches) / "vlm-distill-cache" / "verified"
    return folder.absolute() / name


def read_notes(path: Path) -> set[str]:
    """The digests in a file; none of a file that cannot be one of notes: a link, a device, one of more than `MAX_BYTES`."""
    with contextlib.suppress(OSError, CacheFormatError):
        return set(read_bounded(path, max_bytes=MAX_BYTES).decode(errors="replace").split())
    return set()


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Note nothing inside the block."""
    global _noting
    before, _noting = _noting, False
    try:
        yield
    finally:
        _noting = before


def add_notes(path: Path, digests: Iterable[str]) -> None:
    """Note digests, or say why that cannot be done."""
    if not _noting:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            read_bounded(path, max_bytes=MAX_BYTES)  # a pipe would hold us for ever
        with path.open("a") as file:  # appended in one piece; a note that was cut fits nothing
            file.write("".join(f"{digest}\n" for digest in digests))
    except OSError as error:
        _log.warning(
            "%s cannot be written (%s): what was looked through is so again each time; set %s to a folder that you may write",
            path.parent, error.strerror or error, FOLDER_VARIABLE,
        )  # fmt: skip
    except CacheFormatError:
        _log.warning("%s is no file of notes (too large, or no plain file): what was looked through is so again each time; "
                     "remove it", path)  # fmt: skip

"""Chat templates are programs, often of strangers: they run in a process of their own, under limits.

A sandbox keeps a template from files and from our objects, not from looping for days or writing ten gigabytes, and a
process's own limits cannot be taken back. So `template_program` renders, one process beside each of ours that needs it:
at most `MAX_MEMORY` of memory, `BURST` seconds of processor time above what its conversations bring. It starts in a tenth
of a second, a rendering costs about 0.1 ms more than in process, and it ends when its pipe closes, however that happens.

macOS does not enforce the limit on memory; time, the source and what is written are limited there, too.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vlm_distill_cache.common.errors import DistillError

_PROGRAM = Path(__file__).with_name("template_program.py")
MAX_SOURCE = 1_000_000  # characters of a template; published ones have up to 30,000
BATCH = 2_000_000  # characters that are rendered at once, about: to ask costs as much as to render


class TemplateFailedError(Exception):
    """A template fails on a conversation."""


class TemplateSaysError(TemplateFailedError):
    """A template refuses a conversation in words of its own (``raise_exception``)."""


class TemplateLimitError(DistillError, ValueError):
    """A template takes more time or memory than any needs; no sample is to blame, so that a run ends with it."""


class _Renderer:
    """The process beside this one, which is started when it is first needed and again after a limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, Any]:
        """What the process answers, or which limit it reached."""
        with self._lock:
            process = self._started()
            try:
                requests, answers = _pipes(process)
                rest = memoryview(request)
                while rest:
                    rest = rest[requests.write(rest) :]
                line = bytearray()
                while not line.endswith(b"\n") and (piece := answers.read(2**16)):
                    line += piece
                if line.endswith(b"\n"):
                    found: dict[str, Any] = json.loads(line)
                    if "limit" in found:  # what it holds of the memory is of no use to the next
                        self.close()
                    return found
            except BrokenPipeError:
                pass
            except BaseException:  # as Ctrl-C: an answer is on its way that nobody will read
                process.kill()
                raise
            code = process.wait()
        out_of_time = code == -signal.SIGPROF
        return {
            "limit": "takes more than 2 seconds of processor time"
            if out_of_time
            else f"ended its process (exit code {code})"
        }

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            # -P: the program's folder holds modules of ours, which are to shadow no library's
            self._process = subprocess.Popen(
                [sys.executable, "-P", _PROGRAM],
                bufsize=0,  # nothing of ours waits in a buffer, which a fork would write a second time
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process alone, which then closes the pipe
            )
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            for pipe in _pipes(self._process):
                pipe.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def leave(self) -> None:
        """In a forked process: the pipes and the process are the parent's, and its lock may never be opened."""
        if self._process is not None:
            for pipe in _pipes(self._process):
                pipe.close()
            self._process.returncode = 0  # not ours to wait for
        self.__init__()  # type: ignore[misc]


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


_renderer = _Renderer()
atexit.register(_renderer.close)
os.register_at_fork(after_in_child=_renderer.leave)


def render_template(
    source: str, variables: str, messages: Sequence[Mapping[str, Any]], wanted: Sequence[tuple[int, bool]]
) -> Iterator[str]:
    """Render beginnings of a conversation as the tokenizer's ``apply_chat_template(tokenize=False)`` does.

    Args:
        source: Jinja.
        variables: What a template sees beside the messages, as JSON: the tokenizer's special tokens by name.
        messages: With role and content.
        wanted: How many of the messages each text has, and whether it goes on to where the next answer is to begin.

    Raises:
        TemplateSaysError: The template refuses the conversation in words.
        TemplateFailedError: It fails.
        TemplateLimitError: It reaches a limit.
    """
    length = sum(len(str(message)) for message in messages) + len(source)
    step = max(1, BATCH // length)
    for start in range(0, len(wanted), step):
        asked = [source, variables, messages, wanted[start : start + step]]
        found = _renderer.ask(json.dumps(asked).encode() + b"\n")
        if "limit" in found:
            raise TemplateLimitError(str(found["limit"]))
        if "error" in found:
            kind = TemplateSaysError if found["kind"] == "TemplateError" else TemplateFailedError
            raise kind(found["error"])
        yield from found["texts"]

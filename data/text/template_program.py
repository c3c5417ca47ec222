"""Chat templates in a process of their own: run by `template_process`, a line of JSON in, a line of JSON out.

Imports nothing of ours and no library but jinja2, so that it starts in a tenth of a second and has memory to limit.
The environment is the one in which transformers renders chat templates.
"""

import json
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from time import process_time
from typing import Any, BinaryIO

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_OUTPUT = 8_000_000  # characters of a rendered conversation
MAX_MEMORY = 2**30  # bytes of this process
BURST = 2.0  # seconds of processor time that one conversation may take, or several after each other above their shares
SHARE = 0.05  # seconds that each conversation brings
SHARE_PER_BYTE = 2e-6
MAX_SAID = 2000  # characters of an error's text


class _Generation(Extension):
    """``{% generation %}`` marks an answer for training code that reads the marks; here it writes what is inside."""

    tags = {"generation"}  # noqa: RUF012 - the type that its base class declares

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Any) -> str:
        return str(caller())


class _Dict:
    """``dict`` without its type's attributes."""

    def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def fromkeys(self, *values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*values)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*values: Any, **named: Any) -> None:
        own, *rest = values
        attributes = dict(*rest, **named)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(own, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def compiled(source: str) -> jinja2.Template:
    """A template, compiled in the library's environment."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
    return environment.from_string(source)


def answer(line: bytes) -> dict[str, Any]:
    """Render what a request asks for.

    Returns:
        ``texts``; or ``error`` with the name of its ``kind``; or ``limit``, which was reached.
    """
    try:
        source, variables, messages, wanted = json.loads(line)
        shown: Mapping[str, Any] = {"tools": None, "documents": None, **json.loads(variables)}
        texts: list[str] = []
        length = 0
        for count, asks in wanted:
            pieces: list[str] = []
            for piece in compiled(source).generate(messages=messages[:count], add_generation_prompt=asks, **shown):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_OUTPUT:
                    return {"limit": f"writes more than {MAX_OUTPUT} characters for one conversation"}
            texts.append("".join(pieces))
    except MemoryError:
        return {"limit": f"takes more than {MAX_MEMORY >> 20} MiB of memory"}
    except Exception as error:  # noqa: BLE001 - of any class: a template is a program that runs on the texts
        return {"error": str(error)[:MAX_SAID] or type(error).__name__, "kind": type(error).__name__}
    return {"texts": texts}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more; at the limit of time the system ends the process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # macOS has the name and sets nothing
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    left = BURST
    for line in requests:
        left = min(BURST, max(left, 0) + SHARE + SHARE_PER_BYTE * len(line))
        begun = process_time()
        signal.setitimer(signal.ITIMER_PROF, left)
        found = answer(line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        left -= process_time() - begun
        answers.write(json.dumps(found).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)

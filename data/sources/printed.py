"""Lists and objects that a text holds: as JSON, and as Python, numpy and pandas print them."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.printing import one_line

_BEGINS = re.compile(r"\s*(?:array\(\s*)?[\[{]")
_BEGINS_AS_TEXTS = re.compile(r"\s*(?:array\(\s*)?[\[{]\s*(?:array\(\s*)?[\[{]*\s*[\"']")
_BARE = re.compile(
    r"\s*\[[^\[\]\"']*,[^\[\]\"']*\]\s*"
)  # [one, two]: texts without quotes, of which commas may be part
_OBJECTS = re.compile(r"\s*\[?\s*\{")
_ENDS = re.compile(r"[\]})]\s*$")
_NEIGHBOURS = re.compile(r"[\"']\s*[\"']")
_NAMES = ("True", "False", "None", "nan", "array")
DEEPEST = 200  # brackets within each other: Python's own parser takes no more
_NOT_READ = (ValueError, SyntaxError, RecursionError, MemoryError, TypeError, tokenize.TokenError)


def printed(text: str, *, where: str = "") -> Any:
    """The list or object that the whole of a text is; None if it is neither.

    numpy puts no commas between values (``['a' 'b']``), which Python's own parser joins to one text.

    Args:
        where: What errors call it where it is nearly always a list. Empty: what cannot be read is a plain text.

    Raises:
        SampleError: It begins and ends as a list of texts does, or is one without quotes, and cannot be read as one.
    """
    if not _BEGINS.match(text):
        return None
    with suppress(*_NOT_READ):
        return json.loads(text)
    ways: list[Callable[[str], str | ast.Expression]] = [_as_python, _as_numpy]
    if _OBJECTS.match(text):  # in an object, pprint breaks long texts into neighbours
        ways.append(str)
    for spelt in ways:
        with suppress(*_NOT_READ):
            if isinstance(found := ast.literal_eval(spelt(text.strip())), list | dict):
                return found
    if where and ((_BEGINS_AS_TEXTS.match(text) and _ENDS.search(text)) or _BARE.fullmatch(text)):
        raise SampleError(
            f"{where} holds a list that is neither JSON nor as Python or numpy prints one in full: "
            f"{one_line(text, limit=80)}; write it with json.dumps"
        )
    return None


def _as_python(text: str) -> str:
    if _NEIGHBOURS.search(text):
        raise SyntaxError(text)
    return text


def _as_numpy(text: str) -> ast.Expression:
    tree = ast.parse(_with_commas(text), mode="eval")
    return ast.Expression(_Plain().visit(tree.body))


def _with_commas(text: str) -> str:
    """What numpy printed, with a comma between two values that white space parts; `SyntaxError` if nothing does."""
    starts = [0, *accumulate(len(line) + 1 for line in text.split("\n"))]
    out, done, ended, depth = [], 0, False, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        at, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        depth += (token.string in ("[", "{", "(")) - (token.string in ("]", "}", ")"))
        if depth > DEEPEST:
            raise SyntaxError(text)
        value = token.type in (tokenize.STRING, tokenize.NUMBER) or token.string in _NAMES
        negative = token.string == "-" and not text[end : end + 1].isspace()
        if ended and (value or token.string in ("[", "{") or (negative and text[at - 1].isspace())):
            if value and not text[at - 1].isspace():  # 'it''s', 007
                raise SyntaxError(text)
            out.append(text[done:at] + ",")
            done = at
        if token.type != tokenize.NL:
            ended = token.string in ("]", "}", ")") or (value and token.string != "array")
    return "".join([*out, text[done:]])


class _Plain(ast.NodeTransformer):
    """Arrays as the lists in them, and what pandas prints for nothing as None."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        inside = len(node.args) == 1 and isinstance(node.func, ast.Name) and node.func.id == "array"
        return self.visit(node.args[0]) if inside else node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Constant(None), node) if node.id == "nan" else node

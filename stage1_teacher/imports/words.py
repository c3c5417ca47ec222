"""From a token as a server writes it in JSON, a text, back to its id: only where a single token is written so.

Servers write tokens as they decode them one by one. That loses what the id was where two tokens decode alike (sentencepiece's
``▁dog`` and ``dog``, or halves of a character): such a text is refused, never guessed.
"""

import re
from collections import defaultdict
from functools import cached_property
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.stage1_teacher.imports.served import shown

_NUMBERED = re.compile(r"token_id:([0-9]{1,10})")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenWords:
    """The ids that a tokenizer's tokens may be written as."""

    def __init__(self, tokenizer: Any) -> None:
        """Of a tokenizer; its tokens are looked through when the first text is asked for."""
        self._tokenizer = tokenizer

    def id_of(self, text: Any, data: Any, what: str) -> int:
        """The id of a token.

        Args:
            text: As a server wrote it; ``token_id:17`` names the id itself.
            data: Its bytes as a list of numbers, where the server tells them.

        Raises:
            SampleError: No token, or more than one, is written so.
        """
        if not isinstance(text, str):
            raise SampleError(f"{what}: a token is {shown(text)}, expected a text")
        if numbered := _NUMBERED.fullmatch(text):
            return int(numbered[1])
        written, by_bytes = self._forms
        found = written.get(text, set())
        if isinstance(data, list) and data and all(isinstance(b, int) and 0 <= b < 256 for b in data):
            spelt = by_bytes.get(bytes(data), set())
            found = spelt if bytes(data) != text.encode(errors="replace") else found | spelt
        if len(found) != 1:
            why = "no token of the teacher's tokenizer is" if not found else f"{len(found)} of its tokens are"
            raise SampleError(
                f"{what}: token {shown(text)} cannot be told, {why} written so; have the server name ids (vLLM: "
                "return_tokens_as_token_ids)"
            )
        return next(iter(found))

    @cached_property
    def _forms(self) -> tuple[dict[str, set[int]], dict[bytes, set[int]]]:
        written: defaultdict[str, set[int]] = defaultdict(set)
        spelt: defaultdict[bytes, set[int]] = defaultdict(set)
        alphabet = _byte_alphabet()
        tokens = self._tokenizer.convert_ids_to_tokens(list(range(len(self._tokenizer))))
        added = {str(token) for token in self._tokenizer.added_tokens_decoder.values()}
        joins_words = "▁" in "".join(token[:1] for token in tokens if token)
        for index, token in enumerate(tokens):
            if token is None:
                continue
            written[token].add(index)
            written[self._tokenizer.decode([index], clean_up_tokenization_spaces=False)].add(index)
            if token in added:
                data = token.encode()
            elif byte := _BYTE.fullmatch(token):
                data = bytes([int(byte[1], 16)])
            elif joins_words:
                data = token.replace("▁", " ").encode(errors="replace")
            elif all(letter in alphabet for letter in token):
                data = bytes(alphabet[letter] for letter in token)
            else:
                data = token.encode(errors="replace")
            spelt[data].add(index)
            written[data.decode(errors="replace")].add(index)
        return written, spelt


def _byte_alphabet() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as, and the bytes (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}

"""The answers that a teacher wrote itself, in place of a data set's: text, so that a student can tokenise them.

Logits and attention of such a cache belong to these answers. A student's samples get them before they are encoded.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.codecs.description import Codec, check_whole_number, is_number, shown
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError

MOST_TOKENS = 1 << 20
_TOKEN_CHARACTERS = 1024  # amply: those of byte-pair vocabularies take at most some 250
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, as JSON can spell it: no text holds one


@dataclass(frozen=True, kw_only=True)
class AnswersCodec(Codec):
    """How a record stores the teacher's answers, and how they were written.

    Attributes:
        max_new_tokens: Longest answer in tokens, its end token included.
        temperature: Of sampling, dimensionless; 0: greedy.
        top_p: Of sampling: the smallest set of tokens with this share of the mass, in (0, 1].
        seed: Of sampling.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    signal: ClassVar[str] = "answers"
    of_image: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole_number("max_new_tokens", self.max_new_tokens, 1, MOST_TOKENS)
        check_whole_number("seed", self.seed, 0)
        if not is_number(self.temperature) or (self.temperature != 0 and not 0.001 <= self.temperature <= 1000):
            raise ConfigError(
                f"answer temperature: expected 0 (greedy) or 0.001 to 1000, got {shown(self.temperature)}"
            )
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"answer top_p: expected a share in (0, 1], got {shown(self.top_p)}")

    def fields(self) -> tuple[Field, ...]:
        """One array: the UTF-8 bytes of a JSON list of answers, one a turn."""
        return (Field(name="answer_text", dtype="u1", axis="byte"),)

    def encode(self, answers: Sequence[str]) -> Record:
        """Pack answers, one a turn: `answer_text` u1 `[bytes]`."""
        text = json.dumps(list(answers), ensure_ascii=False, separators=(",", ":"))
        return {"answer_text": np.frombuffer(text.encode(), dtype="u1").copy()}

    def decode(self, record: Record) -> tuple[str, ...]:
        """Unpack answers, one a turn."""
        try:
            answers = json.loads(np.asarray(record["answer_text"]).tobytes().decode())
        except (ValueError, RecursionError) as error:
            raise CacheFormatError(
                f"answer_text is no JSON text ({error}); the cache is damaged: run `cachectl verify`"
            ) from error
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise CacheFormatError(
                f"answer_text: expected a list of texts, got {str(answers)[:80]!r}; the cache is damaged: "
                "run `cachectl verify`"
            )
        if any(_SURROGATE.search(answer) for answer in answers):
            raise CacheFormatError(
                f"answer_text: expected texts of whole characters, got {ascii(answers)[:80]}; the cache is damaged: run "
                "`cachectl verify`"
            )
        return tuple(answers)

    def damage(self, record: Record) -> Iterator[str]:
        """Yield that the text is no list of answers."""
        try:
            answers = self.decode(record)
        except CacheFormatError as error:
            yield str(error)
            return
        if not answers or not all(answer.strip() for answer in answers):
            yield f"answer_text holds {[*answers]!r:.80}; expected an answer for each turn"
        if (longest := max(map(len, answers), default=0)) > self.max_new_tokens * _TOKEN_CHARACTERS:
            yield f"answer_text has {longest} characters in one answer; expected at most {self.max_new_tokens} tokens"

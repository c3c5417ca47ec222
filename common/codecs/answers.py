"""The answers that a teacher wrote itself, in place of a data set's: text, so that a student can tokenise them.

Logits and attention of such a cache belong to these answers. A student's samples get them before they are encoded.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.codecs.description import check_whole_number, codec_from_settings, codec_to_dict
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError


@dataclass(frozen=True, kw_only=True)
class AnswersCodec:
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

    def __post_init__(self) -> None:
        check_whole_number("max_new_tokens", self.max_new_tokens, 1)
        check_whole_number("seed", self.seed, 0)
        if self.temperature != 0 and not 0.001 <= self.temperature <= 1000:
            raise ConfigError(f"answer temperature: expected 0 (greedy) or 0.001 to 1000, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"answer top_p: expected a share in (0, 1], got {self.top_p}")

    def to_dict(self) -> dict[str, Any]:
        """The exact JSON stored in a cache's plan."""
        return codec_to_dict(self, self.signal)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Rebuild the codec from `to_dict`; refuses anything else with a CacheFormatError."""
        return codec_from_settings(cls, cls.signal, stored)

    def fields(self) -> tuple[Field, ...]:
        """One array: the UTF-8 bytes of a JSON list of answers, one a turn."""
        return (Field(name="answer_text", dtype="u1", axis="byte"),)

    def encode(self, answers: Sequence[str]) -> Record:
        """Pack answers, one a turn: `answer_text` u1 `[bytes]`."""
        text = json.dumps(list(answers), ensure_ascii=False, separators=(",", ":"))
        return {"answer_text": np.frombuffer(text.encode(), dtype="u1").copy()}

    def decode(self, record: Record) -> tuple[str, ...]:
        """Unpack answers, one a turn.

        Raises:
            CacheFormatError: If the bytes are no such list.
        """
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
        return tuple(answers)

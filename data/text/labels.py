"""From the tokens of conversations to their labels, and to the prefix that they can share.

Dims: T tokens of one conversation.
"""

from dataclasses import dataclass

import numpy as np

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import SampleError


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """One conversation: ids i8 ``[T]``, and which of them belong to an answer, bool ``[T]``."""

    ids: np.ndarray
    is_answer: np.ndarray


def inside_spans(offsets: np.ndarray, spans: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Which tokens, by their character ranges i8 ``[T, 2]``, share a character with an answer's span, bool ``[T]``.

    A token that straddles the span's start (a blank glued to the answer's first word) belongs to it.
    Tokens without characters (a lone blank, trimmed away) belong to the span they lie in.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    is_answer = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside = (starts < end) & ((ends > start) | ((starts == ends) & (starts >= start)))
        if not inside.any():
            raise SampleError(f"an answer ({end - start} characters) has no tokens; the tokenizer drops its text")
        is_answer |= inside
    return is_answer


def shift_labels(tokens: Tokens) -> np.ndarray:
    """Labels of one conversation: row p gets token p + 1 if that is an answer's, i8 ``[T]``."""
    if not len(tokens.ids):
        raise SampleError("its text has no tokens; there is nothing to begin with")
    if tokens.is_answer[0]:
        raise SampleError("the answer begins with the first token, which no row predicts; add a question")
    labels = np.full(len(tokens.ids), IGNORE_INDEX, dtype=np.int64)
    labels[:-1] = np.where(tokens.is_answer[1:], tokens.ids[1:], IGNORE_INDEX)
    return labels


def shared_length(conversations: list[Tokens]) -> int:
    """Length of the prefix all conversations can share.

    It ends before the first supervised row of any of them: that row's label differs between
    conversations, so it cannot be shared even where its token is.
    """
    first = conversations[0].ids
    shared = len(first)
    for conversation in conversations:
        first_row = int(np.argmax(conversation.is_answer)) - 1
        length = max(min(shared, len(conversation.ids), first_row), 0)
        differs = np.flatnonzero(first[:length] != conversation.ids[:length])
        shared = int(differs[0]) if len(differs) else length
    return shared

"""Whether rows can be about the tokens at which they stand: a dump that is off by one has the right shapes and ids.

What a form says of it itself is checked where the form is read: the first token has no distribution, a server writes each
token's own log-probability, and the likeliest tokens must agree with it. The rest is told by how well the rows explain the
tokens, which a teacher that has learnt nothing cannot show.
"""

import math
from collections.abc import Sequence

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.stage1_teacher.imports.served import SAME, Distribution

_FLOOR = -20.0  # nats; less likely than this is as good as impossible
_BETTER = 3.0  # nats a token by which the row beside must explain a sample's tokens better; honest rows are far below 0
_DECIDED = 12.0  # nats in all, so that one odd token decides nothing
_MASS = 1.02  # of a row, at most
_ENOUGH = 8  # rows of which most lack their target
_MOST = 0.9  # of the probability, which the listed tokens of such rows hold


def refuse_misplaced(rows: Sequence[Distribution], labels: Sequence[int], places: Sequence[int]) -> None:
    """Refuse a sample whose rows are about other tokens than its own.

    Args:
        rows: Log-probabilities in nats of each supervised row's tokens, as they were told.
        labels: The target token of each row.
        places: Of each target in the sample; rows of successive places are compared.

    Raises:
        SampleError: All rows hold the same numbers; or the row before or behind a token explains it far better than its own; or
            most rows lack their target though their tokens hold most of the probability.
    """
    _refuse_equal(rows, labels)
    pairs = [n for n in range(len(rows) - 1) if places[n + 1] == places[n] + 1]
    for side, gains in (
        ("behind", [_gain(rows[n], rows[n + 1], labels[n]) for n in pairs]),
        ("before", [_gain(rows[n + 1], rows[n], labels[n + 1]) for n in pairs]),
    ):
        if sum(gains) > max(_DECIDED, _BETTER * len(gains)):
            raise SampleError(
                f"its rows are off by one: the row {side} each answer token makes it e^{sum(gains) / len(gains):.0f} times as "
                "likely as the row at it; row j of a prompt must be the distribution that token j was drawn from, the first "
                "token having none (of DistillKit and NeMo-Aligner: row j is about token j + 1)"
            )
    unlisted = sum(label not in row for row, label in zip(rows, labels, strict=True))
    mass = sum(map(_mass, rows)) / max(len(rows), 1)
    if len(rows) >= _ENOUGH and 2 * unlisted > len(rows) and mass >= _MOST:
        raise SampleError(
            f"{unlisted} of its {len(rows)} answer tokens are not among those listed in their place, which hold {100 * mass:.0f} "
            "% of the probability: the rows are about other tokens; row j of a prompt must be the distribution that token j was "
            "drawn from"
        )


def refuse_shifted(has_row: Sequence[bool], what: str) -> None:
    """Refuse a whole prompt whose rows begin elsewhere than at its second token.

    Args:
        has_row: Whether a row stands at each of the prompt's tokens.
        what: Names the rows.

    Raises:
        SampleError: The first token has a row, or the second has none and the third has one.
    """
    if has_row and has_row[0]:
        raise SampleError(
            f"{what} has a row at the prompt's first token, of which there is no distribution: its rows are about the token "
            "behind (as a model's logits are), or the prompt's beginning is missing; row j must be the distribution that token "
            "j was drawn from, and row 0 null"
        )
    if has_row[1:3] == [False, True]:
        raise SampleError(
            f"{what} has no row at the prompt's second token and one at the third: its rows stand one place too late; row j must "
            "be the distribution that token j was drawn from, and row 0 alone null"
        )


def refuse_dummy(first: Distribution, second: Distribution, form: str) -> None:
    """Refuse a sequence whose first row only fills a place: where a form says that row j is about token j + 1, all are real.

    Args:
        first: Row 0, in nats.
        second: Row 1, which is about another token behind other tokens.
        form: Of the rows.

    Raises:
        SampleError: Row 1 is a distribution, and row 0 none or the same one.
    """
    real = [len(row) > 1 and 0 < _mass(row) <= _MASS for row in (first, second)]
    if real[1] and (not real[0] or first == second):
        raise SampleError(
            f"row 0 (form {form}) {'repeats row 1' if real[0] else 'is no distribution, row 1 is one'}, so its rows stand one "
            "place too late; row j must be about token j + 1, row 0 about the second token"
        )


def refuse_other_tops(own: float, token: int, tops: Distribution, what: str) -> None:
    """Refuse the likeliest tokens of a place where they contradict the log-probability of the token that stands there.

    Raises:
        SampleError: The token is not one of them, and is likelier than one that is.
    """
    least = min(tops.values(), default=math.inf)
    if token not in tops and own > least + SAME:
        raise SampleError(
            f"{what}: token {token} has the log-probability {own:.6g} and is not among the likeliest, of which one has "
            f"{least:.6g} only: these are of another token (rows off by one?)"
        )


def _refuse_equal(rows: Sequence[Distribution], labels: Sequence[int]) -> None:
    others = [
        {token: value for token, value in row.items() if token != label}
        for row, label in zip(rows, labels, strict=True)
    ]
    if len(rows) > 1 and len(others[0]) > 1 and all(other == others[0] for other in others):
        raise SampleError(
            "the same log-probabilities stand at each of its answer tokens, so they are of one of them at most; ask the server for "
            "those of every token"
        )


def _gain(own: Distribution, beside: Distribution, token: int) -> float:
    """By how many nats another row makes a token likelier than its own; above 0 only where it lists the token."""
    here, there = _log_prob(own, token), _log_prob(beside, token)
    return there - here if token in beside else min(there - here, 0.0)


def _log_prob(row: Distribution, token: int) -> float:
    """What a row tells of a token, or the most that it can be."""
    if token in row:
        return max(row[token], _FLOOR)
    left = 1 - _mass(row)
    return max(min([*row.values(), math.log(left) if left > 0 else _FLOOR]), _FLOOR)


def _mass(row: Distribution) -> float:
    return sum(math.exp(min(value, 0.0)) for value in row.values())

"""What data say must not be learnt: bad answers, and messages left out of the loss; and what nothing here would read."""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.sources.pictures import brief, normal_key, says_none

# Whether the answer is a good one: TRL's and ms-swift's, which is a class where there is no completion, and others'.
_LABEL, _GRADES = "label", ("kto_tag", "desirable", "is_desirable")
_NO_WORDS = frozenset(
    "false f no n bad undesirable negative rejected reject worse wrong incorrect dislike disliked".split()  # noqa: SIM905
)
# Flags of a message, by what they say of it: whether it is learnt, or whether it is not.
_LEARNT = frozenset(
    "loss train training trainable train_on train_on_turn learn weight loss_weight loss_scale loss_mask".split()  # noqa: SIM905
)
_LEFT_OUT = frozenset("mask masked is_masked ignore ignored ignore_loss".split())  # noqa: SIM905
# What a message says beside its text.
_LOST = (
    "tool_calls function_call reasoning reasoning_content reasoning_details thinking thinking_content thinking_blocks "
    "thought thoughts audio input_audio"
)
_UNREAD = frozenset(_LOST.split())
# Signs in a text that stand for what is held under a key: ms-swift's and LLaMA-Factory's, VideoRefer's.
_STAND_FOR = {
    "<bbox>": ("objects",),
    "<ref-object>": ("objects",),
    "<audio>": ("audio", "audios"),
    "<region>": ("annotation", "annotations", "regions"),
}


def refuse_bad_answer(entry: Mapping[str, Any], answer_key: str) -> None:
    """Refuse an entry that calls its answer a bad one.

    ``label`` does so with false, or with the text, in every form: a class label is a number or another text. Beside a
    ``completion`` it does so in every way of writing no, and so does ``kto_tag`` anywhere.

    Args:
        answer_key: Where the answer stands.

    Raises:
        SampleError: Says which key.
    """
    for key, value in entry.items():
        name = normal_key(key)
        if name != _LABEL and name not in _GRADES:
            continue
        says = _says_false if name == _LABEL and answer_key != "completion" else says_no
        if any(map(says, value if isinstance(value, list | tuple) else [value])):
            raise SampleError(f"{key!r} says that the answer is a bad one ({brief(value)}): it must not be learnt")


def refuse_unlearnt(message: Mapping[str, Any], position: int, *, answers: bool) -> None:
    """Refuse a message of which something would be lost, or learnt that must not be.

    Args:
        position: Of the message, for errors.
        answers: Whether it is an answer that would be learnt: only then does it matter what is left out of the loss.

    Raises:
        SampleError: Says which key.
    """
    for key, value in message.items():
        name = normal_key(key)
        if name in _UNREAD and not says_none(value):
            raise SampleError(f"message {position} has {key!r}, which is not read, and would be lost")
        if answers and ((name in _LEARNT and says_no(value)) or (name in _LEFT_OUT and _says_yes(value))):
            raise SampleError(
                f"message {position} has {key!r}, which is not read, and would be lost: it says ({brief(value)}) that this "
                "answer is not learnt; take the answers that are learnt into entries of their own"
            )


def refuse_stand_ins(entry: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Refuse an entry whose texts have signs that stand for what is held under another key of it.

    Raises:
        SampleError: Says which.
    """
    meta = entry.get("meta")
    times = meta.get("token") if isinstance(meta, Mapping) else None  # VTimeLLM's: <s0>, <e0>
    signs = [(sign, key) for sign, keys in _STAND_FOR.items() for key in keys if not says_none(entry.get(key))]
    signs += [(sign, "meta") for sign in (times if isinstance(times, Mapping) else ())]
    for sign, key in signs:
        if any(sign in text for text in texts):
            raise SampleError(f"{sign} stands for what {key!r} holds, which is not read, and would be lost")


def flags_of(message: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What says whether a message is learnt, by key."""
    return ((key, value) for key, value in message.items() if normal_key(key) in _LEARNT | _LEFT_OUT)


def says_no(value: Any) -> bool:
    """Whether a value says no, in any way of writing it: false, zero or less, or a word."""
    if isinstance(value, str):
        word = value.strip().strip("\"'").lower()
        try:
            return float(word) <= 0
        except ValueError:
            return word in _NO_WORDS
    return isinstance(value, Number) and bool(value <= 0)  # type: ignore[operator]


def _says_false(value: Any) -> bool:
    return value is False or (isinstance(value, str) and value.strip().strip("\"'").lower() == "false")


def _says_yes(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("true", "yes", "1", "1.0", "t", "y")
    return isinstance(value, Number) and bool(value > 0)  # type: ignore[operator]

"""The arms of `make experiment-seeds`: what is trained, what is scored without training, and in which table it stands."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SEEDS = (101, 102, 103, 104, 105)  # never used while anything was tuned
BASE = "+ answer_attention"  # all visual tokens, and the losses that students with fewer learn by
LOGITS = "logit KD"
SHARES = (25, 50)  # percent of the visual tokens that are fed
CHOICES = ("random", "grid", "attention", "sinks", "gaze")
ORACLE = "gaze of the teacher"  # on the scored picture; `gaze` is predicted and needs no teacher
VISUAL_TOKENS = 36  # of a picture, all of them
BUDGETS = (10, 33, 50, 100)  # percent of the visual tokens that a decoding step attends
DECODINGS = ("fixed", "shift")
KEPT = (0.75, 0.5)
DIMENSIONS = ("width", "depth")
UNPRUNED = "pruned:1"
CUTS = tuple(f"pruned:{dimension}:{keep}" for dimension in DIMENSIONS for keep in KEPT)
IMPORTANCES: dict[str, dict[str, dict[str, str]]] = {  # options of `PruningConfig`, the first is the default
    "width": {
        "activation": {}, "taylor": {"importance": "taylor"}, "taylor, global": {"importance": "taylor", "ratios": "global"},
    },
    "depth": {"influence": {}, "taylor": {"depth_importance": "taylor"}},
}  # fmt: skip
DATA_SHARES = (5, 10, 100)  # percent of the data that a pruned student recovers on
RECOVERIES: dict[str, dict[str, Any]] = {
    "SFT": {"lm": 1.0},
    "hidden states": {"lm": 0.5, "hidden": 0.5, "hidden_kind": "mse"},  # alpha * MSE + (1 - alpha) * CE, alpha 0.5
    "logits + answer attention": {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0},
}
QUANTISED = ("8bit", "4bit")
_BOTH = RECOVERIES["logits + answer attention"]


@dataclass(frozen=True)
class Arm:
    """One row of a table, for each seed.

    Attributes:
        part: ``losses``, ``selection`` and ``pruning`` are trained; ``training-free``, ``decoding`` and ``quantised``
            are other ways to run a student that ``of`` has trained.
        options: Of `TrainConfig`, or what ``of`` is run with.
        losses: Of the phase that is trained.
    """

    part: str
    options: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    of: str = ""


def selected(share: int, choice: str, *, trained: bool) -> str:
    """The name of an arm with fewer visual tokens."""
    return f"{share} % of the visual tokens, {choice}" + ("" if trained else ", training-free")


def decoded(budget: int, how: str) -> str:
    """The name of an arm whose decoding steps attend few visual tokens."""
    return f"{budget} % of the visual tokens a step, {how}"


def recovered(cut: str, share: int, recovery: str) -> str:
    """The name of an arm of a pruned student."""
    return f"{cut}, {share} % of the data, {recovery}"


QUANTISED_STUDENT = recovered("pruned:width:0.5", 100, "logits + answer attention")


def cuts() -> dict[str, tuple[str, dict[str, str]]]:
    """Pruned students by name: what is kept, and how it is chosen."""
    found: dict[str, tuple[str, dict[str, str]]] = {UNPRUNED: (UNPRUNED, {})}
    for dimension, ways in IMPORTANCES.items():
        for keep in KEPT:
            cut = f"pruned:{dimension}:{keep}"
            found |= {f"{cut}, {name}" if how else cut: (cut, how) for name, how in ways.items()}
    return found


def _answer(kind: str) -> dict[str, Any]:
    return {**_BOTH, "answer_kind": kind}


def _columns(kind: str | None) -> dict[str, Any]:
    return {"lm": 1.0, "logits": 1.0, "visual_columns": 1.0} | ({} if kind is None else {"visual_columns_kind": kind})


def _map(kind: str) -> dict[str, Any]:
    return {"lm": 1.0, "logits": 1.0, "visual_map": 1.0, "visual_map_kind": kind}


def _arms() -> Iterator[tuple[str, Arm]]:
    yield BASE, Arm("losses", losses=_BOTH)
    yield LOGITS, Arm("losses", losses={"lm": 1.0, "logits": 1.0})
    yield "+ answer_attention, relative", Arm("losses", losses=_answer("relative"))
    yield "+ answer_attention, sink_suppressed", Arm("losses", losses=_answer("sink_suppressed"))
    yield "+ visual_columns", Arm("losses", losses=_columns(None))
    yield "+ visual_columns, sink_suppressed", Arm("losses", losses=_columns("sink_suppressed"))
    yield "+ visual_map, cosine", Arm("losses", losses=_map("cosine"))
    yield "+ visual_map, sink_filtered", Arm("losses", losses=_map("sink_filtered"))
    for share in SHARES:
        for choice in CHOICES:
            options = {"visual_tokens": share / 100, "token_selection": choice}
            yield selected(share, choice, trained=True), Arm("selection", options, _BOTH)
            yield selected(share, choice, trained=False), Arm("training-free", options, of=BASE)
        options = {"visual_tokens": share / 100, "token_selection": "gaze", "oracle": True}
        of = selected(share, "gaze", trained=True)
        yield selected(share, ORACLE, trained=True), Arm("training-free", options, of=of)
        yield selected(share, ORACLE, trained=False), Arm("training-free", options, of=BASE)
    for budget in BUDGETS:
        for how in DECODINGS:
            options = {"keep": budget / 100 if budget < 100 else VISUAL_TOKENS, "by": how}
            yield decoded(budget, how), Arm("decoding", options, of=BASE)
    for cut in (UNPRUNED, *CUTS):
        for share in DATA_SHARES:
            for recovery, losses in RECOVERIES.items():
                options = {"student": cut, "data_share": share / 100}
                yield recovered(cut, share, recovery), Arm("pruning", options, losses)
    for bits in QUANTISED:
        yield f"{QUANTISED_STUDENT}, {bits}", Arm("quantised", {"quantise": bits}, of=QUANTISED_STUDENT)


ARMS: dict[str, Arm] = dict(_arms())
KEEP = {arm.of for arm in ARMS.values() if arm.of}  # trained students that others are made of

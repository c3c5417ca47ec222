"""The arms of the experiment: what each student learns from, and in which table it stands."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SEEDS = (101, 102, 103, 104, 105)  # never used while anything was tuned
CURVE_SEEDS = SEEDS[:3]
STEPS = 300
CURVE_STEPS = (75, 150, 300, 600, 1200)
TOKENS = {"same": "mlp", "quarter": "ldpnetv2"}
SFT, LOGITS, ANSWER, COSINE = "SFT", "+ logit KD", "+ answer_attention", "+ visual_map, cosine"


def _losses(**losses: Any) -> dict[str, Any]:
    return {"losses": {"lm": 1.0, "logits": 1.0, **losses}}


def _layered(signal: str, **losses: Any) -> dict[str, Any]:
    """An arm that chooses among the teacher's single layers, all of which its cache holds."""
    return _losses(**{signal: 1.0}, **losses) | {"cache": "layers"}


ARMS: dict[str, dict[str, Any]] = {
    SFT: {"losses": {"lm": 1.0}},
    LOGITS: _losses(),
    "+ visual_map, sink-filtered cosine": _losses(visual_map=1.0, visual_map_kind="sink_filtered"),
    COSINE: _losses(visual_map=1.0, visual_map_kind="cosine"),
    "+ visual_columns": _losses(visual_columns=1.0),
    ANSWER: _losses(answer_attention=1.0),
    "+ answer_attention + TAF": _losses(answer_attention=1.0) | {"projector": "taf"},
    "control: answer_attention of another image": _losses(answer_attention=1.0) | {"shuffle_teacher_images": True},
    "+ text_attention": _losses(text_attention=1.0),
    "+ all_attention (the paper's rows)": _losses(all_attention=1.0),
    "+ TAF": _losses() | {"projector": "taf"},
    "+ visual_map, cosine + TAF": _losses(visual_map=1.0, visual_map_kind="cosine") | {"projector": "taf"},
    "+ visual_map, KL": _losses(visual_map=1.0, visual_map_kind="kl"),
    "+ visual_map, MSE": _losses(visual_map=1.0, visual_map_kind="mse"),
    "+ answer_attention, cosine": _losses(answer_attention=1.0, answer_kind="cosine"),
    "+ answer_attention, relative": _losses(answer_attention=1.0, answer_kind="relative"),
    "+ answer_attention, KL with rest": _losses(answer_attention=1.0, answer_kind="kl_with_rest"),
    "logit KD, reverse KL": _losses(logit_kind="reverse_kl"),
    "logit KD, JSD": _losses(logit_kind="jsd"),
    "logit KD, TVD": _losses(logit_kind="tvd"),
    **{
        f"+ answer_attention, {part} layers": _layered("answer_attention", attention_layers=part)
        for part in ("early", "middle", "late", "all")
    },
    **{
        f"+ visual_map, cosine, {part} layers": _layered("visual_map", visual_map_kind="cosine", attention_layers=part)
        for part in ("early", "middle", "late", "all")
    },
    **{
        f"+ visual_map, cosine, {kind} matching": _layered(
            "visual_map", visual_map_kind="cosine", attention_layers="all", matching=kind
        )
        for kind in ("group", "simple", "adaptive")
    },
    "online: + answer_attention": _losses(answer_attention=1.0) | {"online": True},
}

SIGNALS = tuple(ARMS)[:10]
TABLES: dict[str, tuple[str, ...]] = {
    "Attention signals": SIGNALS,
    "Teacher adapter (TAF)": (LOGITS, "+ TAF", COSINE, "+ visual_map, cosine + TAF", ANSWER, "+ answer_attention + TAF"),
    "Kind of the visual loss": (
        COSINE, "+ visual_map, sink-filtered cosine", "+ visual_map, KL", "+ visual_map, MSE"
    ),
    "Kind of the answer loss": (ANSWER, *(f"{ANSWER}, {kind}" for kind in ("cosine", "relative", "KL with rest"))),
    "Kind of the logit loss": (LOGITS, *(f"logit KD, {kind}" for kind in ("reverse KL", "JSD", "TVD"))),
    "Layers, answer rows": tuple(f"{ANSWER}, {part} layers" for part in ("early", "middle", "late", "all")),
    "Layers, visual maps": tuple(f"{COSINE}, {part} layers" for part in ("early", "middle", "late", "all")),
    "Matching of layers, visual maps": tuple(f"{COSINE}, {kind} matching" for kind in ("group", "simple", "adaptive")),
    "Cached against online": (ANSWER, "online: + answer_attention"),
}  # fmt: skip
QUARTER_ARMS = tuple(ARMS)[:8]
CURVE_ARMS = (SFT, LOGITS, ANSWER)


@dataclass(frozen=True)
class Job:
    """One training: an arm, a token count, a budget, a seed."""

    arm: str
    tokens: str
    steps: int
    seed: int


def _curve() -> list[Job]:
    lengths = [steps for steps in CURVE_STEPS if steps != STEPS]
    return [Job(arm, "quarter", steps, seed) for seed in CURVE_SEEDS for steps in lengths for arm in CURVE_ARMS]


# Seeds outermost in each part, so that an interrupted run has whole comparisons.
PARTS: dict[str, Callable[[], list[Job]]] = {
    "same": lambda: [Job(arm, "same", STEPS, seed) for seed in SEEDS for arm in ARMS],
    "quarter": lambda: [Job(arm, "quarter", STEPS, seed) for seed in SEEDS for arm in QUARTER_ARMS],
    "curve": _curve,
}

"""On which items one student is right and another is wrong, and what both say there: for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch

from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.tools.record_view import load_token_text
from vlm_distill_cache.data.sample import CaptionPair, EvaluationSet, Question, load_picture
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.generation import prompt_of
from vlm_distill_cache.stage2_student.scores.evaluate import ANSWER_TOKENS, weigh_pairs
from vlm_distill_cache.stage2_student.scores.results import HEADLINE, EvaluationReport, Outcome, Place, outcomes
from vlm_distill_cache.stage2_student.scores.taught import Models, say, shrink, teachers_words

SHOWN = 6  # items of each outcome
_MARKS = {0.0: "wrong", 1.0: "right"}


@dataclass(frozen=True, kw_only=True)
class Flip:
    """One item that one student answers better than the other.

    Attributes:
        asked: The question; of a pair both captions, by what they are.
        said: By student: its answer, or by how many nats it prefers the right caption.
        teacher: What the cached teacher held for most likely, or how it was scored; empty where neither is known.
    """

    item_id: str
    kind: str
    outcome: Outcome
    picture: PIL.Image.Image
    asked: Mapping[str, str]
    said: Mapping[str, str]
    teacher: str = ""


@dataclass(frozen=True, kw_only=True)
class Flips:
    """How two students differ on the items of one score: the number of each of `OUTCOMES`, and some items."""

    heading: str
    counts: Mapping[str, int]
    shown: Sequence[Flip]


def choose(places: Sequence[Place], most: int = SHOWN) -> list[Place]:
    """Some items, the kinds in turn."""
    turn: dict[str, int] = {}
    ranked = []
    for kind, place in places:
        turn[kind] = turn.get(kind, 0) + 1
        ranked.append((turn[kind], kind, place))
    return [(kind, place) for _, kind, place in sorted(ranked)[:most]]


@torch.inference_mode()
def collect_flips(
    models: Models,
    reports: tuple[EvaluationReport, EvaluationReport],
    items: EvaluationSet,
    cache: TeacherCache,
    teacher: EvaluationReport,
) -> list[Flips]:
    """Compare two students item by item, and ask both again about a few on which they differ.

    Args:
        models: The one before, then the one after.
        reports: Theirs.
        items: What they were scored on.
        cache: Whose teacher's words are shown where an item is one of its samples.
        teacher: Its scores, told where it was scored on the same items.

    Returns:
        Of each headline that is kept item by item, unless the items are others than those that were scored.
    """
    text = load_token_text(cache)
    found = []
    for name, of in (("likelihood", items.pairs), ("questions", items.questions)):
        before, after = (report.items.get(name, {}) for report in reports)
        placed = outcomes(after, before)
        by_kind: dict[str, list[Any]] = {kind: [] for kind in after}
        for item in of:
            by_kind.setdefault(item.kind, []).append(item)
        if not after or placed is None or any(len(by_kind[kind]) != len(after.get(kind, ())) for kind in by_kind):
            continue
        marks = teacher.items.get(name, {})
        known = {kind: len(values) for kind, values in marks.items()} == {kind: len(v) for kind, v in after.items()}
        shown: list[Flip] = []
        for outcome in ("won", "lost"):
            for kind, place in choose(placed[outcome]):
                item = by_kind[kind][place]
                try:
                    picture = load_picture(item.image)
                    said, asked = _ask(models, item)
                except SampleError:
                    continue
                told = _MARKS.get(marks[kind][place], "half right") if known else ""
                if isinstance(item, Question):
                    told = teachers_words(cache, item.item_id.rpartition("-")[0], picture, item.answer, text) or told
                shown.append(
                    Flip(
                        item_id=item.item_id,
                        kind=kind,
                        outcome=outcome,
                        picture=shrink(picture),
                        asked=asked,
                        said=said,
                        teacher=told,
                    )
                )
        heading = next(heading for key, heading, _ in HEADLINE if key == name)
        found.append(Flips(heading=heading, counts={key: len(items) for key, items in placed.items()}, shown=shown))
    return found


def _ask(models: Models, item: CaptionPair | Question) -> tuple[dict[str, str], dict[str, str]]:
    """What students say about one item, and what they were asked."""
    if isinstance(item, CaptionPair):
        said = {}
        for name, (model, encoder) in models.items():
            right, wrong = weigh_pairs(model, encoder, [item], batch_size=1)["likelihood"][0]
            said[name] = f"{right - wrong:+.2f} nats"
        return said, {"right caption": item.right, "wrong caption": item.wrong}
    said = {name: _answer(model, encoder, item) for name, (model, encoder) in models.items()}
    return said, {"question": item.question, "expected": item.answer}


def _answer(model: Any, encoder: SampleEncoder, item: Question) -> str:
    tokens = len(encoder.tokenizer(item.answer, add_special_tokens=False)["input_ids"])
    prompt = prompt_of(encoder, item)
    return say(model, encoder, [prompt], max(ANSWER_TOKENS, tokens + 2))[0]

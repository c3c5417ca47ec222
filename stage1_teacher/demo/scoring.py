"""How good the built-in teacher is: likelihood of two captions, exact match of short answers.

All items of one picture are packed behind its visual tokens, and teacher forcing replaces
generation: greedy decoding gives exactly the right answer if and only if every answer token is the
most likely one after the right tokens before it. 300 pictures take about 10 seconds on two cores.
"""

from collections import defaultdict
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data.sample import CaptionPair, EvaluationSet, Question, Sample, Turn
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import SampleEncoder

BATCH_SIZE = 16  # sequences a forward pass
MOST_TURNS = 16  # conversations packed behind one picture; bounds the sequence length


@torch.no_grad()
def score_model(
    model: LlavaForConditionalGeneration,
    encoder: SampleEncoder,
    items: EvaluationSet,
) -> dict[str, dict[str, Any]]:
    """Score a model on an evaluation set.

    Args:
        model: Put in evaluation mode and back.
        encoder: The one the model was trained with.
        items: Caption pairs and questions.

    Returns:
        ``{"pairs": {kind: {"accuracy", "items"}}, "questions": {...}}``; accuracy in percent. A pair
        is right if the summed log-probability of the right caption is the larger one.
    """
    jobs = _pack(items)
    right: dict[str, dict[str, list[bool]]] = {"pairs": defaultdict(list), "questions": defaultdict(list)}
    was_training = model.training
    model.eval()
    for start in range(0, len(jobs), BATCH_SIZE):
        chosen = jobs[start : start + BATCH_SIZE]
        encoded = [encoder(sample) for sample, _ in chosen]
        batch = collate(encoded, encoder.tokenizer.pad_token_id)
        logits = model(**batch.model_inputs(), use_cache=False).logits.float()  # [B, T, V]
        for row, (sequence, (_, owners)) in enumerate(zip(encoded, chosen, strict=True)):
            labels = batch.labels[row]
            rows = labels != IGNORE_INDEX
            log_probs = logits[row, rows].log_softmax(-1)
            target = labels[rows]
            gained = log_probs.gather(1, target[:, None])[:, 0]
            hit = log_probs.argmax(-1) == target
            segments = torch.from_numpy(sequence.segment_ids)[rows[: len(sequence)].nonzero()[:, 0]]
            turn = 1 if bool(segments.any()) else 0  # a lone conversation is not packed: its segment is 0
            for item in owners:
                if isinstance(item, CaptionPair):
                    good, bad = gained[segments == turn].sum(), gained[segments == turn + 1].sum()
                    right["pairs"][item.kind].append(bool(good > bad))
                    turn += 2
                else:
                    right["questions"][item.kind].append(bool(hit[segments == turn].all()))
                    turn += 1
    model.train(was_training)
    return {
        part: {
            kind: {"accuracy": round(100 * sum(hits) / len(hits), 1), "items": len(hits)}
            for kind, hits in kinds.items()
        }
        for part, kinds in right.items()
    }


def _pack(items: EvaluationSet) -> list[tuple[Sample, list[CaptionPair | Question]]]:
    """Group items by picture into samples of at most ``MOST_TURNS`` conversations."""
    by_image: dict[str, list[CaptionPair | Question]] = defaultdict(list)
    everything: list[CaptionPair | Question] = [*items.pairs, *items.questions]
    for item in everything:
        by_image[item.image.name].append(item)
    packed = []
    for name, found in by_image.items():
        per_sample = MOST_TURNS // 2  # a pair is two conversations
        for start in range(0, len(found), per_sample):
            owned = found[start : start + per_sample]
            turns = tuple(turn for item in owned for turn in _turns(item))
            sample = Sample(sample_id=name, images=(owned[0].image,), turns=turns, independent_turns=True)
            packed.append((sample, owned))
    return packed


def _turns(item: CaptionPair | Question) -> list[Turn]:
    if isinstance(item, Question):
        return [Turn(question=item.question, answer=item.answer)]
    return [Turn(question="", answer=text) for text in (item.right, item.wrong)]


def mean_accuracy(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the unweighted mean over kinds, percent, of each part that has items."""
    return {
        part: round(sum(entry["accuracy"] for entry in kinds.values()) / len(kinds), 1)
        for part, kinds in scores.items()
        if kinds
    }

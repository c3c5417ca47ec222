"""The third phase of the built-in teacher: the language model learns to answer from what it sees.

Conversations about a picture are packed behind its visual tokens, by the same encoder and with the
same block-diagonal mask that stage one uses: what the teacher learns from is what it is shown later.

Dims: B sequences, T tokens, A supervised rows, V vocabulary, D width.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.files.atomic import publish_file, temporary_for
from vlm_distill_cache.data.sample import Dataset, Sample, Turn
from vlm_distill_cache.data.shapes.dataset import ShapesDataset
from vlm_distill_cache.data.shapes.text import (
    Rule,
    list_caption,
    relation_caption,
    relation_question,
    side_question,
    yes_no_question,
)
from vlm_distill_cache.data.text.collate import Batch, collate
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.stage1_teacher.demo.model import WarmCosine

logger = logging.getLogger(__name__)


SAVED_EVERY = 100  # steps
OTHERS_SCALE = 0.25  # learning rate of embeddings, norms and biases as a share of the matrices' rate
DRILLS = ("locations", "relations")


class DrilledScenes(Dataset):
    """Drawn scenes with drills before the data set's own turns; only the teacher is trained on them.

    Finding a named object is the skill that relations are built from. With the data set's one location
    turn a picture a trial had 26 % of locations right after 6,400 pictures; with a turn for every object,
    83 % after 4,000. ``locations`` asks for every object and two sides; ``relations``, which then goes
    on, adds three relation captions and four questions; both add a list.

    Args:
        drill: One of `DRILLS`.
    """

    def __init__(self, scenes: ShapesDataset, drill: str) -> None:
        self._scenes, self._drill = scenes, drill
        self.name = f"{scenes.name}, drilled in {drill}"
        self.sample_ids: Sequence[str] = scenes.sample_ids

    def __getitem__(self, index: int) -> Sample:
        sample, scene = self._scenes[index], self._scenes.scene(index)
        generator = np.random.default_rng([self._scenes.seed, index])
        if self._drill == "locations":
            drills = [(f"where is the {thing.noun}", thing.cell_name) for thing in scene.objects]
            rules: tuple[Rule, ...] = (side_question, side_question)
        else:
            drills = [("", relation_caption(scene, generator)) for _ in range(3)]
            rules = (side_question, relation_question, relation_question, yes_no_question)
        drills.append(("", list_caption(scene, generator)))
        for rule in rules:
            asked = rule(scene, generator) or rule(scene, generator)  # a second try, then none
            drills += [asked] if asked else []
        turns = [Turn(question=question, answer=answer) for question, answer in drills]
        return replace(sample, turns=tuple(dict.fromkeys([*turns, *sample.turns])))


def train_language(
    model: LlavaForConditionalGeneration,
    encoder: SampleEncoder,
    dataset: Dataset,
    *,
    steps: int,
    images_per_step: int,
    rate: float,
    seed: int,
    unfinished: Path | None = None,
) -> None:
    """Train all parameters that require a gradient on a data set's answers.

    Args:
        dataset: Passed over in a new order as often as the steps need.
        images_per_step: Pictures, with all their conversations.
        unfinished: File that holds the state every `SAVED_EVERY` steps and at the end, and that training goes on from; None:
            nowhere.
    """
    optimizer = WarmCosine(model, rate=rate, steps=steps, warmup=50, others_scale=OTHERS_SCALE)
    done = 0
    if unfinished is not None and unfinished.is_file():
        state = torch.load(unfinished, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["steps"]
    started = time.monotonic()
    for step, batch in enumerate(_batches(encoder, dataset, steps, images_per_step, seed, first=done), start=done):
        hidden = model.model(**batch.model_inputs(), use_cache=False).last_hidden_state  # [B, T, D]
        loss = answer_loss(model.lm_head(hidden[batch.labels != IGNORE_INDEX]), batch.labels)
        optimizer.step(loss)
        if step % 50 == 49:
            left = (time.monotonic() - started) / (step + 1 - done) * (steps - step - 1)
            logger.info(
                "language %d/%d: loss %.3f nats a token, %.0f s left",
                step + 1, steps, loss.item(), left,
            )  # fmt: skip
        if unfinished is not None and (step % SAVED_EVERY == SAVED_EVERY - 1 or step == steps - 1):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": step + 1}
            with temporary_for(unfinished) as temporary:
                torch.save(state, temporary)
                publish_file(temporary, unfinished)


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of supervised rows, each answer weighted by the square root of its length.

    Most words of a caption are a free choice (which object comes first), all of a short answer follows
    from the picture; plain token means give captions three quarters of the weight.

    Args:
        logits: Of the supervised rows, float ``[A, V]``.
        labels: Shifted labels, int64 ``[B, T]``.

    Returns:
        Scalar, nats a token.
    """
    rows = labels != IGNORE_INDEX
    begins = rows.clone()
    begins[:, 1:] &= ~rows[:, :-1]
    answer = begins.flatten().cumsum(0).view_as(rows)[rows] - 1  # [A], number of the answer a row is in
    weight = torch.bincount(answer)[answer].float().rsqrt()
    losses = F.cross_entropy(logits, labels[rows], reduction="none")
    return (losses * weight).sum() / weight.sum()


def _batches(
    encoder: SampleEncoder, dataset: Dataset, steps: int, count: int, seed: int, *, first: int
) -> Iterator[Batch]:
    """Yield the batches of ``count`` samples from number ``first`` to ``steps``; the next is encoded while the model runs."""
    generator = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < steps * count:
        order += generator.permutation(len(dataset)).tolist()

    def encode(step: int) -> Batch:
        chosen = order[step * count : (step + 1) * count]
        return collate([encoder(dataset[index]) for index in chosen], encoder.tokenizer.pad_token_id)

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(encode, first)
        for step in range(first, steps):
            batch = ahead.result()
            if step + 1 < steps:
                ahead = pool.submit(encode, step + 1)
            yield batch

"""The teacher of `make experiment-several`: the built-in one, taught to compare pictures and to follow clips.

The shipped teacher knows single pictures. It keeps its tower and tokenizer, and goes on with drawn pairs and clips of
its own, single pictures among them, by the recipe that it was trained with. Words of the questions that the tokenizer
lacks ("moves") are one token to it, and no two questions become one by that.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vlm_distill_cache.data.sample import Dataset, FrameSampling, Question, Sample, Turn

SEED = 7_000_003  # of pictures and order: none of a student's
BATCH = 16  # items of a forward pass
KINDS = ("scene", "comparison", "motion")


class Drilled(Dataset):
    """Pairs and clips with drills in front; only the teacher is trained on them.

    Where a named object is in one of the pictures, or in the first or last frame, is what its questions are built from.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.name, self.sample_ids = f"{dataset.name}, drilled", dataset.sample_ids

    def __getitem__(self, index: int) -> Sample:
        sample = self._dataset[index]
        if not sample.independent_turns or not sample.sample_id.rpartition("-")[0].endswith(("comparison", "motion")):
            return sample
        drills = []
        if sample.videos:
            scenes = sample.images[0].scenes()  # type: ignore[union-attr]
            places = {"1": scenes[0], str(len(scenes)): scenes[-1]}
        else:
            places = {str(number): image.scene() for number, image in enumerate(sample.images, start=1)}  # type: ignore[union-attr]
        for number, scene in places.items():
            drills += [(f"where is the {thing.noun} in image {number}", thing.cell_name) for thing in scene.objects]
        turns = [Turn(question=question, answer=answer) for question, answer in drills]
        return replace(sample, turns=(*turns, *sample.turns))


def orthogonalised(grad: Any, coefficients: tuple[float, float, float], steps: int, eps: float) -> Any:
    """`torch.optim.Muon`'s Newton-Schulz iteration in the gradient's own precision.

    The library's works in bfloat16, which a CPU without such instructions emulates: 14 to 31 ms for a matrix of this
    teacher in place of 1 to 2, half of a step.

    Args:
        grad: Float ``[rows, columns]``.
        coefficients: Of the polynomial, linear term first.
        steps: Of the iteration.
        eps: Least norm that is divided by.

    Returns:
        ``[rows, columns]`` with singular values near 1.
    """
    linear, cubic, quintic = coefficients
    tall = grad.size(0) > grad.size(1)
    found = grad.T if tall else grad
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.T
        found = linear * found + (cubic * gram + quintic * gram @ gram) @ found
    return found.T if tall else found


def make_teacher(folder: Path, *, steps: int, images_per_step: int = 8) -> None:
    """Train the teacher and save it as a checkpoint folder, once; it appears when it is complete.

    A killed training goes on where it was saved last.
    """
    if (folder / "training.json").is_file():
        return
    import torch
    from transformers import LlavaForConditionalGeneration

    from vlm_distill_cache.data.shapes.kinds import ShapesOfKinds
    from vlm_distill_cache.stage1_teacher.demo.language import train_language
    from vlm_distill_cache.stage1_teacher.demo.teacher import TEMPLATE, build_demo_encoder, builtin_teacher_directory

    model = LlavaForConditionalGeneration.from_pretrained(builtin_teacher_directory(), dtype=torch.float32).train()
    model.model.vision_tower.requires_grad_(requires_grad=False)
    encoder = replace(build_demo_encoder(), max_length=2048, most_pictures=None, sampling=FrameSampling())
    dataset = Drilled(ShapesOfKinds("train", steps * images_per_step, SEED, KINDS))
    unfinished = folder.with_name(f"{folder.name}-unfinished.pt")
    with patch("torch.optim._muon._zeropower_via_newtonschulz", orthogonalised):
        train_language(
            model, encoder, dataset, steps=steps, images_per_step=images_per_step, rate=1.5e-3, seed=SEED,
            unfinished=unfinished,
        )  # fmt: skip
    scratch = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    model.half().save_pretrained(scratch)
    encoder.tokenizer.save_pretrained(scratch)
    encoder.image_encoder.processor.save_pretrained(scratch)
    (scratch / "training.json").write_text(json.dumps({"template": TEMPLATE, "steps": steps, "seed": SEED}))
    scratch.rename(folder)
    unfinished.unlink(missing_ok=True)


def as_sample(item: Question) -> Sample:
    """An item with all that it shows, as the sample whose answer is scored."""
    turn = Turn(question=item.question, answer=item.answer, places=item.places)
    return Sample(sample_id=item.item_id, images=(item.image, *item.further), turns=(turn,), system=item.system)


def score(model: Any, encoder: Any, items: Sequence[Question]) -> dict[str, float]:
    """Answers that are right, percent by kind: each token the most likely one behind the right tokens before it.

    That is what greedy decoding answers right, and costs one pass.
    """
    import torch

    from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
    from vlm_distill_cache.data.text.collate import collate
    from vlm_distill_cache.stage2_student.scores.evaluate import supervised_logits
    from vlm_distill_cache.stage2_student.students.model import model_inputs_of

    right: dict[str, list[bool]] = defaultdict(list)
    was_training = model.training
    model.eval()
    for start in range(0, len(items), BATCH):
        asked = items[start : start + BATCH]
        batch = collate([encoder(as_sample(item)) for item in asked], encoder.tokenizer.pad_token_id)
        rows = batch.labels != IGNORE_INDEX
        with torch.inference_mode():
            best = supervised_logits(model, model_inputs_of(model, batch), rows).argmax(-1)
        hits = (best == batch.labels[rows]).split(rows.sum(dim=1).tolist())
        for item, hit in zip(asked, hits, strict=True):
            right[item.kind].append(bool(hit.all()))
    model.train(was_training)
    return {kind: round(100 * sum(hits) / len(hits), 2) for kind, hits in right.items()}

"""The teacher of `make experiment-several`: the built-in one, taught to compare pictures and to follow clips.

The shipped teacher knows single pictures. It keeps its tower and tokenizer, and goes on with drawn pairs and clips of
its own, single pictures among them, by the recipe that it was trained with. Words of the questions that the tokenizer
lacks ("moves") are one token to it, and no two questions become one by that.
"""

import copy
import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from vlm_distill_cache.data.sample import Dataset, FrameSampling, Question, Sample, Turn
from vlm_distill_cache.data.shapes import pairs
from vlm_distill_cache.data.shapes.scene import Scene
from vlm_distill_cache.data.shapes.text import PLURALS, Pair

SEED = 7_000_003  # of pictures and order: none of a student's
BATCH = 16  # items of a forward pass
KINDS = ("scene", "comparison", "motion")
COURSES = ("places", "comparisons")  # of the teacher's training, one after the other
RATES = (1.5e-3, 3e-3)  # peaks, of each
MOST_SINGLE = 8  # drills about one picture of a pair in the second course: more would outweigh the comparisons
MORE_LAYERS = 2  # from the second course on: what is compared has to be found first


class Drilled(Dataset):
    """Pairs and clips with drills in front; only the teacher is trained on them.

    Args:
        course: One of `COURSES`. ``places``: where every object is in each picture, or in the first and the last frame, which
            is what its questions are built from. ``comparisons``: what the questions are one step away from, and the
            questions themselves about every object; after the places alone, comparing stayed at chance.
    """

    def __init__(self, dataset: Dataset, course: str) -> None:
        self._dataset, self._course = dataset, course
        self.name, self.sample_ids = f"{dataset.name}, drilled in {course}", dataset.sample_ids

    def __getitem__(self, index: int) -> Sample:
        sample = self._dataset[index]
        if not sample.independent_turns or not sample.sample_id.rpartition("-")[0].endswith(("comparison", "motion")):
            return sample
        if sample.videos:
            drills = _clip_drills(sample.images[0], self._course)
        else:
            scenes = [image.scene() for image in sample.images]  # type: ignore[union-attr]
            drills = _pair_drills(scenes, self._course, np.random.default_rng([SEED, index]))
        turns = [Turn(question=question, answer=answer) for question, answer in drills]
        return replace(sample, turns=tuple(dict.fromkeys([*turns, *sample.turns])))


def _places(scene: Scene, number: int) -> list[Pair]:
    return [(f"where is the {thing.noun} in image {number}", thing.cell_name) for thing in scene.objects]


def _clip_drills(drawn: Any, course: str) -> list[Pair]:
    scenes = drawn.scenes()
    last = len(scenes)
    if course == "places":
        return [*_places(scenes[0], 1), *_places(scenes[-1], last)]
    clip = drawn.clip()
    words = ("left", "right") if clip.axis == 0 else ("above", "below")
    found: list[Pair] = []
    for mover in (0, 1):
        noun = clip.objects[mover].noun
        first, later = (scene.objects[mover] for scene in (scenes[0], scenes[-1]))
        rises = (later.column, later.row) > (first.column, first.row)
        found.append((
            f"is the {noun} in image 1 {words[0]} or {words[1]} {'of ' * (clip.axis == 0)}the {noun} in image {last}",
            words[0 if rises else 1],
        ))  # fmt: skip
    for asked in ((0, 0), (1, 1)):
        turns = replace(clip, asked=asked).turns(backwards=drawn.backwards)
        found += [(turn.question, turn.answer) for turn in turns.values()]
    return found


def _pair_drills(scenes: list[Scene], course: str, generator: np.random.Generator) -> list[Pair]:
    if course == "places":
        return [drill for number, scene in enumerate(scenes, start=1) for drill in _places(scene, number)]
    both = (scenes[0], scenes[1])
    single: list[Pair] = []
    for number, scene in enumerate(both, start=1):
        of_both = sorted(both[0].nouns | both[1].nouns)
        single += [(f"is there a {noun} in image {number}", "yes" if noun in scene.nouns else "no") for noun in of_both]
        for thing in scene.objects:
            single.append((f"what size is the {thing.noun} in image {number}", thing.size))
            if sum(other.shape == thing.shape for other in scene.objects) == 1:
                single.append((f"what color is the {thing.shape} in image {number}", thing.color))
        for shape, plural in PLURALS.items():
            alike = sum(thing.shape == shape for thing in scene.objects)
            single.append((f"how many {plural} are there in image {number}", str(alike)))
    found = [single[place] for place in generator.permutation(len(single))[:MOST_SINGLE]]
    for shape in PLURALS:
        found += [pairs.more(both, shape), pairs.count(both, shape)]
    return [*found, *filter(None, (pairs.difference(both, first) for first in (0, 1)))]


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


def deepen(model: Any, layers: int) -> None:
    """Put decoder layers behind those of a language model, drawn as the built-in teacher's were: at first they change nothing."""
    import torch

    language = model.model.language_model
    torch.manual_seed(SEED)
    for _ in range(layers):
        layer = copy.deepcopy(language.layers[-1])
        layer.self_attn.layer_idx = len(language.layers)
        for parameter in layer.parameters():
            torch.nn.init.ones_(parameter) if parameter.ndim == 1 else torch.nn.init.normal_(
                parameter, std=parameter[0].numel() ** -0.5
            )
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(last.weight)
        language.layers.append(layer)
    language.config.num_hidden_layers = model.config.text_config.num_hidden_layers = len(language.layers)


def make_teacher(folder: Path, *, steps: Sequence[int], images_per_step: int = 8) -> None:
    """Train the teacher and save it as a checkpoint folder, once; it appears when it is complete.

    A killed training goes on where it was saved last.

    Args:
        steps: Of each of `COURSES`.
        images_per_step: Samples, with all their conversations.
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
    states = [folder.with_name(f"{course}-{count}.pt") for course, count in zip(COURSES, steps, strict=True)]
    for number, (course, state) in enumerate(zip(COURSES, states, strict=True)):
        if number:
            deepen(model, MORE_LAYERS)
        dataset = Drilled(ShapesOfKinds("train", steps[number] * images_per_step, SEED + number, KINDS), course)
        with patch("torch.optim._muon._zeropower_via_newtonschulz", orthogonalised):
            train_language(
                model, encoder, dataset, steps=steps[number], images_per_step=images_per_step, rate=RATES[number],
                seed=SEED + number, unfinished=state,
            )  # fmt: skip
    scratch = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    model.half().save_pretrained(scratch)
    encoder.tokenizer.save_pretrained(scratch)
    encoder.image_encoder.processor.save_pretrained(scratch)
    (scratch / "training.json").write_text(json.dumps({"template": TEMPLATE, "steps": list(steps), "seed": SEED}))
    scratch.rename(folder)
    for state in states:
        state.unlink(missing_ok=True)


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

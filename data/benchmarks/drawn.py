"""Small benchmarks of drawn scenes in published layouts: a suite that works without a download, in minutes on a CPU.

Pictures and sentences are ours (`data.shapes`, the test split), keys and nesting those of the publications. No reader knows
that they are drawn.
"""

import base64
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vlm_distill_cache.data.sample import CaptionPair, Question, load_picture
from vlm_distill_cache.data.shapes.dataset import shapes_evaluation
from vlm_distill_cache.data.shapes.scene import COLORS, SHAPES, Scene, SceneObject, draw_scene, sample_scene
from vlm_distill_cache.data.shapes.text import RELATIONS, relation_holds

ITEMS = 40  # of each kind
_SEED = 19
_YES_NO = {"yes", "no"}
_POPE = ("random", "popular", "adversarial")


def write_drawn(folder: Path, *, items: int = ITEMS) -> None:
    """Write the benchmarks, each in a folder of its own: the same bytes each time.

    Args:
        folder: There, and empty.
        items: Of each kind; SugarCrepe has seven kinds, POPE three files.
    """
    evaluation = shapes_evaluation("test", items, seed=_SEED)
    questions = evaluation.questions
    _sugarcrepe(folder / "sugarcrepe", evaluation.pairs)
    _winoground(folder / "winoground", items)
    _vqav2(folder / "vqav2", questions)
    _gqa(folder / "gqa", questions)
    _mmbench(folder / "mmbench", [one for one in questions if one.answer not in _YES_NO and one.kind != "location"])
    _pope(folder / "pope", items)


def _sugarcrepe(folder: Path, pairs: Sequence[CaptionPair]) -> None:
    kinds: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        name = f"{pair.image.name}.png"
        _save(pair.image.load(), folder / "val2017" / name)
        of_kind = kinds.setdefault(pair.kind, {})
        of_kind[str(len(of_kind))] = {"filename": name, "caption": pair.right, "negative_caption": pair.wrong}
    for kind, entries in kinds.items():
        _write_json(folder / f"{kind}.json", entries)


def _winoground(folder: Path, items: int) -> None:
    """Two scenes that differ in which of two objects is where, and the two captions of the same words."""
    lines = []
    for number, (scenes, captions) in enumerate(_swapped_scenes(items)):
        entry: dict[str, Any] = {"id": number}
        for place, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
            name = f"ex_{number}_img_{place}"
            picture = draw_scene(scene, np.random.default_rng([_SEED, 1, number, place]))
            _save(PIL.Image.fromarray(picture), folder / "images" / f"{name}.png")
            entry |= {f"image_{place}": name, f"caption_{place}": caption}
        tags = {"tag": "Noun Phrase, Determiner-Numeral", "secondary_tag": "", "collapsed_tag": "Object"}
        lines.append({**entry, **tags, "num_main_preds": 1})
    _write(folder / "examples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _swapped_scenes(count: int) -> Iterator[tuple[tuple[Scene, Scene], tuple[str, str]]]:
    generator = np.random.default_rng([_SEED, 0])
    while count:
        scene = sample_scene(generator)
        first, second, *others = scene.objects
        there = [relation for relation in RELATIONS if relation_holds(first, relation, second)]
        if first.size != second.size or not there:  # an object of another size would tell them apart
            continue
        swapped = Scene(objects=(_at(first, second), _at(second, first), *others))
        relation = there[int(generator.integers(len(there)))]
        yield (
            (scene, swapped),
            (f"a {first.noun} {relation} a {second.noun}", f"a {second.noun} {relation} a {first.noun}"),
        )
        count -= 1


def _at(thing: SceneObject, place: SceneObject) -> SceneObject:
    return replace(thing, row=place.row, column=place.column, x=place.x, y=place.y)


def _vqav2(folder: Path, questions: Sequence[Question]) -> None:
    asked: list[dict[str, Any]] = []
    annotated: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for question in questions:
        number = numbers.setdefault(question.image.name, len(numbers) + 1)
        _save(load_picture(question.image), folder / "val2014" / f"COCO_val2014_{number:012d}.png")
        ids = {"image_id": number, "question_id": number * 1000 + sum(one["image_id"] == number for one in asked)}
        kind = "yes/no" if question.answer in _YES_NO else "number" if question.answer.isdecimal() else "other"
        answers = [
            {"answer": question.answer, "answer_confidence": "yes", "answer_id": place} for place in range(1, 11)
        ]
        asked.append({**ids, "question": question.question})
        annotated.append({
            **ids, "question_type": " ".join(question.question.split()[:2]), "answer_type": kind,
            "multiple_choice_answer": question.answer, "answers": answers,
        })  # fmt: skip
    about = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    _write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**about, "task_type": "Open-Ended", "questions": asked}
    )
    _write_json(folder / "v2_mscoco_val2014_annotations.json", {**about, "annotations": annotated})


def _gqa(folder: Path, questions: Sequence[Question]) -> None:
    structural = {"attribute": "query", "relation": "query", "side": "choose", "count": "query", "size": "query"}
    semantic = {"relation": "rel", "side": "rel", "count": "cat", "yes_no": "obj"}
    found = {}
    for number, question in enumerate(questions):
        if question.kind == "location":
            continue
        name = question.image.name
        _save(load_picture(question.image), folder / "images" / f"{name}.png")
        kinds = {
            "structural": structural.get(question.kind, "verify"),
            "semantic": semantic.get(question.kind, "attr"),
            "detailed": question.kind,
        }
        found[f"{number:08d}"] = {
            "question": question.question, "imageId": name, "answer": question.answer, "fullAnswer": question.answer,
            "isBalanced": True, "groups": {"global": None, "local": question.kind}, "entailed": [],
            "equivalent": [f"{number:08d}"], "types": kinds, "annotations": {}, "semantic": [], "semanticStr": "",
        }  # fmt: skip
    _write_json(folder / "testdev_balanced_questions.json", found)


def _mmbench(folder: Path, questions: Sequence[Question]) -> None:
    """Four options a question, the right one drawn among them."""
    generator = np.random.default_rng([_SEED, 2])
    pools = (COLORS, SHAPES, ("small", "large"), ("left", "right", "above", "below"), tuple("012345678"))
    rows = []
    for number, question in enumerate(questions):
        pool = next(pool for pool in pools if question.answer in pool)
        others = [word for word in pool if word != question.answer]
        wrong = generator.permutation(others).tolist()[:3]
        options = generator.permutation([question.answer, *wrong]).tolist()
        buffer = io.BytesIO()
        load_picture(question.image).save(buffer, format="PNG")
        rows.append({
            "index": number, "question": question.question, "hint": "",
            **{letter: (options[place] if place < len(options) else "") for place, letter in enumerate("ABCD")},
            "answer": "ABCD"[options.index(question.answer)], "category": question.kind,
            "l2-category": "drawn scenes", "image": base64.b64encode(buffer.getvalue()).decode(), "split": "dev",
        })  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(folder / "mmbench_dev_en.tsv", text.getvalue())


def _pope(folder: Path, items: int) -> None:
    """Half of the questions name an object that is there; those that do not: any, a frequent, a nearly true one."""
    lines: dict[str, list[Mapping[str, Any]]] = {name: [] for name in _POPE}
    generator = np.random.default_rng([_SEED, 3])
    for number in range(items):
        scene = sample_scene(generator)
        name = f"COCO_val2014_{number + 1:012d}.png"
        _save(PIL.Image.fromarray(draw_scene(scene, generator)), folder / "val2014" / name)
        absent = [f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" not in scene.nouns]
        present = [thing.noun for thing in scene.objects]
        first, second = scene.objects[:2]
        crossed = [
            noun for noun in (f"{first.color} {second.shape}", f"{second.color} {first.shape}") if noun in absent
        ]
        chosen = {
            "random": absent[int(generator.integers(len(absent)))],
            "popular": next(noun for noun in ("red circle", "blue square", *absent) if noun in absent),
            "adversarial": (crossed or absent)[0],
        }
        for kind, noun in chosen.items():
            for asked, label in ((present[int(generator.integers(len(present)))], "yes"), (noun, "no")):
                entry = {"question_id": len(lines[kind]) + 1, "image": name, "text": f"is there a {asked}"}
                lines[kind].append({**entry, "label": label})
    for kind, entries in lines.items():
        _write(folder / f"coco_pope_{kind}.json", "".join(json.dumps(entry) + "\n" for entry in entries))


def _save(picture: PIL.Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        picture.save(path)


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")

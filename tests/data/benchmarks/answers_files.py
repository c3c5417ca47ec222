"""Small folders in the published layouts of short-answer benchmarks: own pictures and sentences, published keys and nesting."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

TEN = ["red"] * 5 + ["dark red"] * 3 + ["maroon", "brown"]


def picture(colour: int) -> bytes:
    """A small PNG whose first pixel tells which it is."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 6), (colour, 10, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, colour: int) -> None:
    """Write a picture, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(colour))


def write(path: Path, value: Any) -> Path:
    """Write JSON, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def table(path: Path, rows: Sequence[Mapping[str, Any]], types: Mapping[str, Any] | None = None) -> Path:
    """Write a table of the hub: bytes under ``image`` become a stored picture; ``types`` of columns that hold nothing."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    stored = [
        {key: {"bytes": value, "path": None} if isinstance(value, bytes) else value for key, value in row.items()}
        for row in rows
    ]
    made = pa.Table.from_pylist(stored)
    for name, kind in (types or {}).items():
        made = made.set_column(made.column_names.index(name), name, pa.array(made[name].to_pylist(), kind))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path)
    return path


def tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write VLMEvalKit's table: bytes become base64."""
    texts = [
        {
            key: base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
            for key, value in row.items()
        }
        for row in rows
    ]
    lines = ["\t".join('"' + text.replace('"', '""') + '"' for text in row.values()) for row in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["\t".join(rows[0]), *lines]) + "\n", encoding="utf-8")
    return path


def ten(answers: Sequence[str] = TEN) -> list[dict[str, Any]]:
    """Answers as annotations of the VQA challenge list them."""
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number} for number, answer in enumerate(answers, 1)
    ]


def vqa_head(split: str, description: str = "Questions of our own.", version: str = "2.0") -> dict[str, Any]:
    """What the JSON of the challenge begins with."""
    return {
        "info": {"description": description, "version": version, "year": 2020, "contributor": "us", "url": ""},
        "data_type": "mscoco",
        "data_subtype": split,
        "license": {"name": "own", "url": ""},
    }


def write_vqav2(folder: Path, split: str = "val2014", *, annotated: bool = True) -> None:
    """Questions, annotations and the pictures of a split."""
    questions = [
        {"image_id": 42, "question": "What colour is the roof?", "question_id": 42000},
        {"image_id": 42, "question": "Is the door open?", "question_id": 42001},
        {"image_id": 73, "question": "How many gates are there?", "question_id": 73000},
    ]
    told = [
        ("other", "what colour is the", TEN),
        ("yes/no", "is the", ["yes"] * 10),
        ("number", "how many", ["2"] * 10),
    ]
    annotations = [
        {
            "question_type": question_type,
            "multiple_choice_answer": answers[0],
            "answers": ten(answers),
            "image_id": question["image_id"],
            "answer_type": answer_type,
            "question_id": question["question_id"],
        }
        for question, (answer_type, question_type, answers) in zip(questions, told, strict=True)
    ]
    head = {**vqa_head(split), "task_type": "Open-Ended"}
    write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {**head, "questions": questions})
    if annotated:
        write(folder / f"v2_mscoco_{split}_annotations.json", {**vqa_head(split), "annotations": annotations})
    images = split.replace("test-dev", "test")
    for number in (42, 73):
        put(folder / images / f"COCO_{images}_{number:012d}.jpg", number)


def write_okvqa(folder: Path) -> None:
    """OK-VQA's two files: kinds of knowledge in the annotations, answers raw and processed."""
    questions = [
        {"image_id": 42, "question": "Which trade uses this tool?", "question_id": 420},
        {"image_id": 73, "question": "Which season is it?", "question_id": 730},
    ]
    answers = [["mason"] * 6 + ["builder"] * 4, ["autumn"] * 4 + ["fall"] * 6]
    annotations = [
        {
            "image_id": question["image_id"],
            "answer_type": "other",
            "question_type": kind,
            "question_id": question["question_id"],
            "answers": [{**entry, "raw_answer": entry["answer"]} for entry in ten(given)],
            "confidence": 3,
        }
        for question, kind, given in zip(questions, ("nine", "ten"), answers, strict=True)
    ]
    kinds = {"nine": "Crafts", "ten": "Weather"}
    head = vqa_head("val2014", version="1.0")
    write(folder / "OpenEnded_mscoco_val2014_questions.json", {**head, "questions": questions})
    write(folder / "mscoco_val2014_annotations.json", {**head, "annotations": annotations, "question_types": kinds})
    for number in (42, 73):
        put(folder / "images" / f"COCO_val2014_{number:012d}.jpg", number + 100)


def textvqa_rows(*, secret: bool = False) -> list[dict[str, Any]]:
    """Entries of TextVQA; answers of its test split are blank."""
    answers = [[""] * 10, [""] * 10] if secret else [["open 9"] * 10, ["baker's"] * 4 + ["baker"] * 6]
    return [
        {
            "question": question,
            "image_id": name,
            "image_classes": ["House"],
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "image_width": 8,
            "image_height": 6,
            "answers": given,
            "question_tokens": question.split(),
            "question_id": 34600 + number,
            "set_name": "test" if secret else "val",
        }
        for number, (question, name, given) in enumerate(
            zip(("when is it open?", "whose shop is it?"), ("00aa11", "00bb22"), answers, strict=True)
        )
    ]


def write_textvqa(folder: Path) -> None:
    """TextVQA 0.5.1: a list under data, pictures by their id."""
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write(folder / "TextVQA_0.5.1_val.json", {**head, "data": textvqa_rows()})
    for number, name in enumerate(("00aa11", "00bb22")):
        put(folder / "train_images" / f"{name}.jpg", number + 1)


def write_vizwiz(folder: Path) -> None:
    """VizWiz: a list of entries with ten answers; and its test split, which has questions alone."""
    entries = [
        {"answers": ["unanswerable"] * 8 + ["tin"] * 2, "answer_type": "unanswerable", "answerable": 0},
        {"answers": ["beans"] * 10, "answer_type": "other", "answerable": 1},
        {"answers": ["soup"] * 7 + ["unanswerable"] * 3, "answer_type": "other", "answerable": 1},
    ]
    for number, entry in enumerate(entries):
        name = f"VizWiz_val_{number:08d}.jpg"
        put(folder / "val" / name, number)
        listed = [{"answer_confidence": "maybe", "answer": answer} for answer in entry["answers"]]
        entry |= {"image": name, "question": "What is in this tin?", "answers": listed}
    write(folder / "Annotations" / "val.json", entries)
    put(folder / "test" / "VizWiz_test_00000000.jpg", 9)
    write(folder / "Annotations" / "test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "Which can is it?"}])


GQA = {
    "101": ("Is the gate wooden?", "yes", "verify", "attr", ["101", "102", "103"], True),
    "102": ("What is the gate made of?", "wood", "query", "attr", [], True),
    "103": ("Is the gate made of metal?", "no", "verify", "attr", ["999"], False),
    "104": ("What is left of the gate?", "tree", "query", "rel", ["104"], True),
}


def gqa_question(item_id: str) -> dict[str, Any]:
    """A question as GQA's files have it."""
    question, answer, structural, semantic, entailed, balanced = GQA[item_id]
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "gate (1)"}],
        "entailed": entailed,
        "equivalent": [item_id],
        "question": question,
        "imageId": "n77" if item_id != "104" else "2388",
        "isBalanced": balanced,
        "groups": {"global": "material" if answer == "wood" else None, "local": "09-gate"},
        "answer": answer,
        "semanticStr": "select: gate (1)",
        "annotations": {"answer": {"0": "1"}, "question": {"3": "1"}, "fullAnswer": {"2": "1"}},
        "types": {"detailed": "verifyAttr", "semantic": semantic, "structural": structural},
        "fullAnswer": f"It is {answer}.",
    }


def write_gqa(folder: Path) -> None:
    """GQA: an object of questions by their id, with the choices file, pictures by their id."""
    write(folder / "questions1.2" / "val_all_questions.json", {item_id: gqa_question(item_id) for item_id in GQA})
    choices = {item_id: {"valid": ["yes", "no", "wood", "tree"], "plausible": ["yes", "wood"]} for item_id in GQA}
    write(folder / "eval" / "val_choices.json", choices)
    for number, name in enumerate(("n77", "2388")):
        put(folder / "images" / f"{name}.jpg", number + 1)


def docvqa_rows(*, secret: bool = False) -> list[dict[str, Any]]:
    """Entries of DocVQA."""
    rows = [
        ("Who signed the letter?", ["M. Adler", "Adler"], ["handwritten", "form"]),
        ("What is the total?", ["41.50"], ["table/list"]),
    ]
    return [
        {
            "questionId": 500 + number,
            "question": question,
            "question_types": types,
            "image": f"documents/xx{number}_1.png",
            "docId": number,
            "ucsf_document_id": f"xx{number}",
            "ucsf_document_page_no": "1",
            **({} if secret else {"answers": answers}),
            "data_split": "test" if secret else "val",
        }
        for number, (question, answers, types) in enumerate(rows)
    ]


def write_docvqa(folder: Path) -> None:
    """DocVQA 1.0: a list under data."""
    head = {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "val"}
    write(folder / "val_v1.0_withQT.json", {**head, "data": docvqa_rows()})
    for number in range(2):
        put(folder / "spdocvqa_images" / f"xx{number}_1.png", number + 1)


def write_chartqa(folder: Path) -> None:
    """ChartQA: a file of people's questions and one of a model's, beside a folder of charts."""
    for kind, label in (("human", "50"), ("augmented", "Wheat")):
        entries = [
            {"imgname": f"{kind}{number}.png", "query": "Which crop grew most?", "label": label} for number in range(2)
        ]
        write(folder / "test" / f"test_{kind}.json", entries)
        for number in range(2):
            put(folder / "test" / "png" / f"{kind}{number}.png", number + 1)

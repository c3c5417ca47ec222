"""Small folders of the layouts that ask with options, as published: their keys and nesting, own pictures and words."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

COLOURS = ("red", "blue", "green", "white")
ASKED = ("Which colour is it?", "Which of the two is warmer, the red or the blue one?")


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def text_png(colour: str) -> str:
    return base64.b64encode(png(colour)).decode()


def write_pictures(folder: Path, colours: Mapping[str, str]) -> None:
    for name, colour in colours.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(colour))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows as TSV, or as parquet with stored pictures (bytes under ``image``)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tsv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        path.write_text(json.dumps(rows))
    return path


def stored(colour: str) -> dict[str, Any]:
    return {"bytes": png(colour), "path": f"{colour}.png"}


def mmbench_rows(*, circular: bool = True, answers: bool = True) -> list[dict[str, Any]]:
    """Two questions, of three and two options, with all their rotations; those share the first one's picture."""
    asked = [
        (3, "", "Which colour is it?", ["red", "blue", "green"], 0, "colour", "perception", text_png("red")),
        (8, "It is cold.", "Is it snow or sand?", ["snow", "sand"], 0, "substance", "reasoning", text_png("white")),
    ]
    rows = []
    for turn in range(3 if circular else 1):
        for index, hint, question, options, right, category, level, image in asked:
            if turn < len(options):
                turned = [*options[turn:], *options[:turn]]
                row: dict[str, Any] = {"index": index + turn * 1_000_000, "question": question, "hint": hint}
                row |= dict(zip("ABCD", [*turned, "", ""], strict=False))
                row |= {"answer": "ABCD"[turned.index(options[right])]} if answers else {}
                row |= {"category": category, "image": str(index) if turn else image, "source": "own"}
                rows.append({**row, "l2-category": level, "comment": "", "split": "dev"})
    return rows


def mmbench_hub_rows() -> list[dict[str, Any]]:
    """As lmms-lab has it: stored pictures, ``nan`` as a text, a capital letter in the category's name."""
    found = []
    for row in mmbench_rows():
        row = {key: value or "nan" if isinstance(value, str) else value for key, value in row.items()}
        image = {"3": "red", "8": "white"}[str(row["index"] % 1_000_000)]
        found.append({**row, "L2-category": row.pop("l2-category"), "image": stored(image)})
    return found


def mmstar_rows(*, inline: bool = True) -> list[dict[str, Any]]:
    asked = [
        (
            0,
            "What is left?\nOptions: A: a cat, at rest, B: a dog, C: a cow, D: a hen",
            "B",
            "logical reasoning",
            "order",
        ),
        (1, "What is x?\nChoices:\n(A) 2.5\n(B) 3.5", "A", "math", "geometry"),
    ]
    rows = []
    for index, question, answer, category, level in asked:
        row: dict[str, Any] = {"index": index, "question": question, "image": stored(COLOURS[index])}
        row |= {"answer": answer, "category": category, "l2_category": level}
        if inline:
            row["meta_info"] = {"source": "own", "split": "val", "image_path": f"images/{index}.jpg"}
        else:
            texts = [["a cat, at rest", "a dog", "a cow", "a hen"], ["2.5", "3.5", "", ""]][index]
            row |= {"question": question.partition("\n")[0], "image": text_png(COLOURS[index])}
            row |= dict(zip("ABCD", texts, strict=True))
        rows.append(row)
    return rows


def seedbench(folder: Path) -> None:
    def asked(number: int, kind: int, data_type: str, data_id: str) -> dict[str, Any]:
        choices = dict(
            zip(("choice_a", "choice_b", "choice_c", "choice_d"), ("One", "Two", "Three", "Four"), strict=True)
        )
        row = {
            "answer": "ABCD"[number - 101],
            **choices,
            "data_id": data_id,
            "data_type": data_type,
            "question": "How many?",
        }
        return {**row, "question_id": str(number), "question_type_id": kind}

    questions = [
        asked(101, 1, "image", "454_2591"),
        asked(102, 5, "image", "455_77.jpg"),
        {**asked(103, 10, "video", "P01_cut.mp4"), "segment": [1.0, 2.5]},
        {**asked(104, 10, "video", "P02_cut.mp4"), "segment": [1.0, 2.5]},
    ]
    types = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    folder.mkdir(parents=True)
    (folder / "SEED-Bench.json").write_text(json.dumps({"questions": questions, "question_type": types}))
    (folder / "SEED-Bench-image").mkdir()
    (folder / "SEED-Bench-image" / "454_2591").write_bytes(png("red"))  # without an ending, as in the archive
    write_pictures(folder, {"SEED-Bench-image/455_77.jpg": "blue", "frames/P01_cut.png": "green"})


def ai2d(folder: Path, *, ids: bool = True) -> None:
    def asked(number: int, *, by_letter: bool) -> dict[str, Any]:
        return {
            "abcLabel": by_letter,
            "answerTexts": ["A", "B", "C"] if by_letter else ["ear", "nose", "toe"],
            "correctAnswer": number,
            "questionId": f"0.png-{number}",
        }

    for name in ("0", "1"):
        questions = {f"What is {name}?": asked(2, by_letter=False), f"Which is {name}?": asked(1, by_letter=True)}
        path = folder / "questions" / f"{name}.png.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"imageName": f"{name}.png", "questions": questions}))
        write_pictures(folder, {f"images/{name}.png": "red", f"abc_images/{name}.png": "blue"})
    if ids:
        (folder / "ai2d_test_ids.csv").write_text("1\n")


def scienceqa_problems() -> dict[str, dict[str, Any]]:
    def problem(split: str, subject: str, grade: int, hint: str, image: str | None, answer: int) -> dict[str, Any]:
        row = {
            "question": "Which is it?",
            "choices": ["ice", "sand", "fog"],
            "answer": answer,
            "hint": hint,
            "image": image,
        }
        row |= {
            "task": "closed choice",
            "grade": f"grade{grade}",
            "subject": subject,
            "topic": "own",
            "category": "own",
        }
        return {**row, "skill": "Tell", "lecture": "", "solution": "See ![this](x.png).", "split": split}

    return {
        "1": problem("train", "natural science", 2, "", None, 0),
        "2": problem("test", "natural science", 7, "It is cold.", "image.png", 0),
        "4": problem("test", "language science", 3, "", None, 1),
        "5": problem("test", "social science", 12, "", "choice_0.png", 2),
        "6": problem("val", "social science", 6, "Look.", None, 2),
    }


def scienceqa(folder: Path) -> None:
    problems = scienceqa_problems()
    splits = {
        split: [name for name in problems if problems[name]["split"] == split] for split in ("train", "val", "test")
    }
    folder.mkdir(parents=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({**splits, "minitest": splits["test"][:1]}))
    write_pictures(folder, {"images/test/2/image.png": "white", "images/test/9/choice_0.png": "red"})


def scienceqa_llava() -> list[dict[str, Any]]:
    def said(name: str, question: str, answer: str, image: str | None = None) -> dict[str, Any]:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": name, **({"image": image} if image else {}), "conversations": turns}

    options = "Options: (A) ice (B) sand"
    return [
        said("2", f"Context: It is cold.\nQuestion: Which?\n{options}\n<image>", "The answer is A.", "2/image.png"),
        said("4", f"Context: N/A\nQuestion: Which?\n{options}", "Sand is dry, and A is not. The answer is B."),
    ]

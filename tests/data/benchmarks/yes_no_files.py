"""Small folders of yes-or-no benchmarks as they are published: own questions and pictures, published keys and nesting.

Pictures are of one colour whose red part is their number, so that a test sees which of them an item shows.
"""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from vlm_distill_cache.data.sample import ImageSource

POPE = {  # split: question id, picture, question, whether yes is right
    "random": [(1, 10, "Is there a kite in the image?", True), (2, 10, "Is there a boat in the image?", False)],
    "popular": [(1, 10, "Is there a kite in the image?", True), (2, 20, "Is there a chair in the image?", False)],
    "adversarial": [(1, 20, "Is there a lamp in the image?", True), (2, 20, "Is there a desk in the image?", False)],
}
MME = {  # task: picture's name, its number, question, whether yes is right
    "existence": [
        ("000000000139.jpg", 30, "Is there a kite here? Please answer yes or no.", True),
        ("000000000139.jpg", 30, "Is there a boat here? Please answer yes or no.", False),
    ],
    "artwork": [
        ("0001.jpg", 40, "Was this painted? Please answer yes or no.", False),
        ("0001.jpg", 40, "Was this drawn? Please answer yes or no.", True),
    ],
    "code_reasoning": [
        ("0001.png", 50, "Does it print 1? Please answer yes or no.", True),
        ("0001.png", 50, "Does it print 2? Please answer yes or no.", False),
    ],
}
HALLUSION = [  # category, subcategory, visual_input, set, figure, question id, question, right, picture
    ("VS", "ocr", "0", "0", "0", "0", "Is the sign red?", True, None),
    ("VS", "ocr", "1", "0", "1", "0", "Is the sign red?", True, 60),
    ("VS", "ocr", "2", "0", "2", "0", "Is the sign red?", False, 70),
    ("VD", "ocr", "1", "0", "1", "0", "Is the word long?", False, 80),
    ("VD", "ocr", "2", "0", "2", "0", "Is the word long?", True, 90),
    ("VD", "ocr", "2", "0", "2", "1", "Is the word short?", False, 90),
]
NLVR = [("5-0", "0", "There is a black box.", True), ("5-3", "0", "There is a black box.", False)]
NLVR2 = [  # identifier, sentence, label, numbers of the two pictures
    ("dev-7-0-1", "The left image shows a cup.", True, (100, 110)),
    ("dev-7-2-1", "The left image shows a cup.", False, (120, 130)),
    ("dev-8-0-0", "Both images show dogs.", False, (140, 150)),
]


def picture(number: int, ending: str = "png") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 6), (number, 0, 0)).save(buffer, "PNG" if ending == "png" else "JPEG", quality=100)
    return buffer.getvalue()


def seen(source: ImageSource | None, at: tuple[int, int] = (0, 0)) -> int | None:
    """Which picture that is, tens alone (JPEG moves colours a little)."""
    return None if source is None else round(source.load().getpixel(at)[0] / 10) * 10


def put(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number, path.suffix[1:]))


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: Path, rows: Sequence[Mapping[str, Any]], images: Sequence[str] = ("image",)) -> None:
    """As `datasets` stores it: pictures are ``{bytes, path}``."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    stored = [
        {
            key: {"bytes": picture(value), "path": None} if key in images and value else value
            for key, value in row.items()
        }
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(stored), path)


def tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """As VLMEvalKit has it: base64, or the index of the row that holds the same picture."""
    first: dict[int, Any] = {}
    cells = ["\t".join(rows[0])]
    for row in rows:
        number = row["image"]
        shown = first[number] if number in first else base64.b64encode(picture(number)).decode()
        first.setdefault(number, row["index"])
        cells.append("\t".join(str(shown if key == "image" else value) for key, value in row.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(cells) + "\n")


def yes(right: bool, capital: bool = True) -> str:
    said = "Yes" if right else "No"
    return said if capital else said.lower()


def write_pope(folder: Path, form: str) -> None:
    name = "COCO_val2014_{:012d}"
    rows = [(split, *row) for split, given in POPE.items() for row in given]
    if form == "github":
        for split in POPE:
            lines(
                folder / f"coco/coco_pope_{split}.json",
                [
                    {
                        "question_id": number,
                        "image": name.format(shown) + ".jpg",
                        "text": text,
                        "label": yes(right, False),
                    }
                    for number, shown, text, right in POPE[split]
                ],
            )
        for number in (10, 20):
            put(folder / f"val2014/{name.format(number)}.jpg", number)
    elif form == "hub":
        parquet(
            folder / "data/test-00000-of-00001-ab12.parquet",
            [
                {
                    "id": str(place),
                    "question_id": str(number),
                    "question": text,
                    "answer": yes(right, False),
                    "image_source": name.format(shown),
                    "image": shown,
                    "category": split,
                }
                for place, (split, number, shown, text, right) in enumerate(rows)
            ],
        )
    elif form == "hub-splits":
        for split in POPE:
            parquet(
                folder / f"Full/{split}-00000-of-00001.parquet",
                [
                    {
                        "question_id": number,
                        "question": text,
                        "answer": yes(right),
                        "image_source": name.format(shown),
                        "image": shown,
                    }
                    for number, shown, text, right in POPE[split]
                ],
            )
    else:
        shared = [("random,popular", *POPE["random"][0]), *[row for row in rows if row[1:] != POPE["random"][0]]]
        tsv(
            folder / "POPE.tsv",
            [
                {"index": place, "image": shown, "question": text, "answer": yes(right), "category": split}
                for place, (split, _, shown, text, right) in enumerate(shared)
            ],
        )


def write_mme(folder: Path, form: str) -> None:
    rows = [(task, *row) for task, given in MME.items() for row in given]
    root = folder / "MME_Benchmark_release_version"
    if form in ("folders", "eval-tool"):
        for task, name, number, _, _ in rows:
            put(root / task / ("images" if task == "artwork" else "") / name, number)
        for task in MME:
            told = [f"{name}\t{text}\t{yes(right)}" for name, _, text, right in MME[task]]
            (folder / "eval_tool/Your_Results").mkdir(parents=True, exist_ok=True)
            (folder / f"eval_tool/Your_Results/{task}.txt").write_text("\n".join(told) + "\n")
            (folder / "eval_tool/LaVIN").mkdir(parents=True, exist_ok=True)
            (folder / f"eval_tool/LaVIN/{task}.txt").write_text("".join(line + "\tyes it is\n" for line in told))
    if form == "folders":
        for task in MME:
            place = root / task / ("questions_answers_YN" if task == "artwork" else "")
            place.mkdir(parents=True, exist_ok=True)
            text = "".join(f"{text}\t{yes(right)}\r\n" for _, _, text, right in MME[task])
            (place / f"{Path(MME[task][0][0]).stem}.txt").write_text(text + "\r\n")
    elif form == "hub":
        told = [
            {"question_id": f"{task}/{name}", "image": number, "question": text, "answer": yes(right), "category": task}
            for task, name, number, text, right in rows
        ]
        parquet(folder / "data/test-00000-of-00002.parquet", told[:3])
        parquet(folder / "data/test-00001-of-00002.parquet", told[3:])
    elif form == "tsv":
        tsv(
            folder / "MME.tsv",
            [
                {"index": place, "image": number, "question": text, "answer": yes(right), "category": task}
                for place, (task, _, number, text, right) in enumerate(rows)
            ],
        )


def write_hallusion(folder: Path, form: str) -> None:
    keys = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question")
    rows = []
    for row in HALLUSION:
        told = dict(zip(keys, row[:7], strict=True))
        rows.append(
            told | {"sample_note": "x", "gt_answer_details": "y", "gt_answer": str(int(row[7])), "picture": row[8]}
        )
    if form == "github":
        for row in rows:
            number = row.pop("picture")
            place = f"./hallusion_bench/{row['category']}/{row['subcategory']}/{row['set_id']}_{row['figure_id']}.png"
            row["filename"] = place if number else None
            if number:
                put(folder / place, number)
        (folder / "HallusionBench.json").write_text(json.dumps(rows))
    elif form == "hub":
        named = [{**row, "filename": "z", "image": row["picture"]} for row in rows]
        shown = [{key: value for key, value in row.items() if key != "picture"} for row in named]
        parquet(folder / "data/image-00000-of-00001.parquet", [row for row in shown if row["image"]])
        parquet(folder / "data/non_image-00000-of-00001.parquet", [row for row in shown if not row["image"]])
    else:
        tsv(
            folder / "HallusionBench.tsv",
            [
                {
                    "index": "_".join(("hallusion", *(row[key] for key in ("category", "subcategory", *keys[3:6])))),
                    "image": row["picture"],
                    "question": row["question"],
                    "answer": yes(row["gt_answer"] == "1"),
                    "category": row["category"],
                    "l2-category": row["subcategory"],
                }
                for row in rows
                if row["picture"]
            ],
        )


def write_nlvr(folder: Path, name: str = "dev/dev.json", split: str = "dev-") -> None:
    lines(
        folder / name,
        [
            {
                "sentence": text,
                "label": str(right).lower(),
                "identifier": number,
                "directory": directory,
                "evals": {"r1": "true"},
                "structured_rep": [[], [], []],
            }
            for number, directory, text, right in NLVR
        ],
    )
    for place, (number, directory, _, _) in enumerate(NLVR):
        for order in range(6):
            put(folder / f"dev/images/{directory}/{split}{number}-{order}.png", 60 * place + 10 * order)


def write_nlvr2(folder: Path, form: str) -> None:
    stems = [number.rpartition("-")[0] for number, *_ in NLVR2]
    if form in ("github", "blip", "lxmert"):
        for stem, (_, _, _, numbers) in zip(stems, NLVR2, strict=True):
            for side in (0, 1):
                put(folder / f"images/dev/{stem}-img{side}.png", numbers[side])
    if form == "github":
        urls = {"left_url": "https://example.org/a.jpg", "right_url": "https://example.org/b.jpg"}
        rows = [
            {"sentence": text, "label": str(right), "identifier": number, **urls} for number, text, right, _ in NLVR2
        ]
        lines(folder / "data/dev.json", [{**row, "writer": "1", "validation": {"61": "False"}} for row in rows])
    elif form == "blip":
        rows = [
            {"images": [f"dev/{stem}-img0.png", f"dev/{stem}-img1.png"], "sentence": text, "label": str(right)}
            for stem, (_, text, right, _) in zip(stems, NLVR2, strict=True)
        ]
        (folder / "nlvr_dev.json").write_text(json.dumps(rows))
    elif form == "lxmert":
        told = [
            {"identifier": number, "img0": f"{stem}-img0", "img1": f"{stem}-img1", "label": int(right), "sent": text}
            for stem, (number, text, right, _) in zip(stems, NLVR2, strict=True)
        ]
        (folder / "valid.json").write_text(json.dumps(told))
    else:
        keys = ("question_id", "question", "answer") if form == "hub" else ("identifier", "sentence", "label")
        parquet(
            folder / "data/balanced_dev-00000-of-00001.parquet",
            [
                dict(zip(keys, (number, text, str(right)), strict=True))
                | {"left_image": left, "right_image": right_side}
                for number, text, right, (left, right_side) in NLVR2
            ],
            images=("left_image", "right_image"),
        )


def write_questions(folder: Path) -> None:
    rows = [
        {"question_id": "scene/1.png", "image": "scene/1.png", "text": f"What is it?\n{which}", "category": "scene"}
        for which in ("Say it.", "Say more.")
    ]
    lines(folder / "llava_mine.jsonl", [*rows, {"question_id": 7, "image": "gone/2.png", "text": "<image>\nWhy?"}])
    lines(
        folder / "answers.jsonl",
        [{"question_id": 7, "prompt": "Why?", "text": "So.", "answer_id": "a", "model_id": "m"}],
    )
    put(folder / "pictures/scene/1.png", 10)
    put(folder / "pictures/other/2.png", 20)

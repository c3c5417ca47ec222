"""Small folders of caption benchmarks in their published layouts: own pictures and sentences, published keys and nesting.

Picture number N is of one colour, (N, 100, 200), so that a test sees which one was found.
"""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

SUGAR = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def png(number: int, size: tuple[int, int] = (12, 10)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, (number, 100, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, number: int) -> str:
    """A picture file; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number))
    return path.name


def seen(image: Any) -> int:
    """Which picture that is."""
    return int(image.load().getpixel((0, 0))[0])


def base64_png(number: int) -> str:
    return base64.b64encode(png(number)).decode()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], *, pictures: Sequence[str], labels: str = "") -> None:
    """A parquet file as `datasets` writes it: ``pictures`` are columns of pictures, given by number or by lists of them."""
    datasets = pytest.importorskip("datasets")
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {}
    for key, value in rows[0].items():
        if key in pictures:
            features[key] = datasets.Sequence(datasets.Image()) if isinstance(value, list) else datasets.Image()
        elif key == labels:
            features[key] = datasets.ClassLabel(names=sorted({row[key] for row in rows}))
        elif isinstance(value, list):
            features[key] = datasets.Sequence(datasets.Value("string"))
        else:
            features[key] = datasets.Value("int64" if isinstance(value, int) else "string")

    def stored(value: Any) -> Any:
        return [stored(item) for item in value] if isinstance(value, list) else {"bytes": png(value), "path": None}

    filled = [{key: stored(value) if key in pictures else value for key, value in row.items()} for row in rows]
    datasets.Dataset.from_list(filled, features=datasets.Features(features)).to_parquet(str(path))


def sugar_rows() -> list[dict[str, Any]]:
    return [
        {"kind": kind, "number": 10 * place + n, "right": f"A cup and {n} spoons, {kind}", "wrong": f"{n} cups, {kind}"}
        for place, kind in enumerate(SUGAR)
        for n in range(2)
    ]


def sugarcrepe(folder: Path, form: str) -> None:
    """``json`` (GitHub), ``hub`` (a repository a subset), ``table`` (all in one), ``copy`` (JSON lines), ``csv``."""
    rows = sugar_rows()
    for kind in SUGAR:
        own = [row for row in rows if row["kind"] == kind]
        if form == "json":
            entries = {
                str(n): {
                    "filename": put(folder / "val2017" / f"{row['number']:012d}.jpg", row["number"]),
                    "caption": row["right"],
                    "negative_caption": row["wrong"],
                }
                for n, row in enumerate(own)
            }
            write_json(folder / "data" / f"{kind}.json", entries)
        elif form == "hub":
            table = [
                {"image": r["number"], "tested_labels": [r["right"], r["wrong"]], "true_label": r["right"]} for r in own
            ]
            path = folder / f"SugarCrepe_{kind}" / "data" / "test-00000-of-00001-ab12cd34ef56ab78.parquet"
            write_table(path, table, pictures=["image"], labels="true_label")
    if form == "table":
        table = [{"images": r["number"], "caption": r["right"], "negative_caption": r["wrong"]} for r in rows]
        write_table(folder / "data" / "train-00000-of-00001.parquet", table, pictures=["images"])
    if form == "copy":
        lines = [
            {
                "image_file_name": put(folder / "images" / f"{r['number']}.jpg", r["number"]),
                "positive_caption": [r["right"]],
                "negative_caption": [r["wrong"]],
                "original_file_name": r["kind"],
            }
            for r in rows
        ]
        write_lines(folder / "examples.jsonl", lines)
    if form == "csv":
        lines = ['"filename","caption","negative_caption","type","subtype"']
        for r in rows:
            name = put(folder / "val2017" / f"{r['number']:012d}.jpg", r["number"])
            lines.append(f'"{name}","{r["right"]}","{r["wrong"]}","{r["kind"][:-4]}","{r["kind"][-3:]}"')
        (folder / "test_SugarCrepe.csv").write_text("\n".join(lines) + "\n")


def sugarcrepe_pp(folder: Path, form: str) -> None:
    """``json`` (GitHub and hub: a list a file), ``copy`` (JSON lines), ``saved`` (a table)."""
    kinds = {"swap_att": 0, "replace_obj": 1}
    rows = [
        {
            "id": n,
            "kind": kind,
            "number": 20 + 10 * place + n,
            "texts": (f"A red cup {n}, {kind}", f"Cup {n} is red, {kind}", f"A blue cup {n}, {kind}"),
        }
        for kind, place in kinds.items()
        for n in range(2)
    ]
    keys = ("caption", "caption2", "negative_caption")
    for row in rows:
        put(folder / "images" / f"{row['number']:012d}.jpg", row["number"])
    if form == "json":
        for kind in kinds:
            entries = [
                {"id": r["id"], "filename": f"{r['number']:012d}.jpg", **dict(zip(keys, r["texts"], strict=True))}
                for r in rows
                if r["kind"] == kind
            ]
            write_json(folder / "data" / f"{kind}.json", entries)
    elif form == "copy":
        names = ("positive_caption_1", "positive_caption_2", "negative_caption")
        lines = [
            {
                "image_file_name": f"{r['number']:012d}.jpg",
                "original_file_name": r["kind"],
                **{name: [text] for name, text in zip(names, r["texts"], strict=True)},
            }
            for r in rows
        ]
        write_lines(folder / "examples.jsonl", lines)
    else:
        table = [{"image": r["number"], **dict(zip(keys, r["texts"], strict=True)), "subset": r["kind"]} for r in rows]
        write_table(folder / "test.parquet", table, pictures=["image"])


def winoground(folder: Path, form: str) -> None:
    rows = [
        {
            "id": n,
            "image_0": 40 + 2 * n,
            "image_1": 41 + 2 * n,
            "caption_0": f"dog {n} chases a cat",
            "caption_1": f"a cat chases dog {n}",
            "tag": "Noun",
            "secondary_tag": "",
            "num_main_preds": 1,
            "collapsed_tag": ("Object", "Relation")[n % 2],
        }
        for n in range(3)
    ]
    if form == "json":
        for row in rows:
            for side in (0, 1):
                put(folder / "data" / "images" / f"ex_{row['id']}_img_{side}.png", row[f"image_{side}"])
                row[f"image_{side}"] = f"ex_{row['id']}_img_{side}"
        write_lines(folder / "data" / "examples.jsonl", rows)
    else:
        write_table(folder / "data" / "test-00000-of-00001.parquet", rows, pictures=["image_0", "image_1"])


def bivlc(folder: Path, form: str) -> None:
    rows = [
        {
            "image": 50 + 2 * n,
            "caption": f"cup {n} is left of a box",
            "negative_caption": f"a box is left of cup {n}",
            "negative_image": 51 + 2 * n,
            "type": ("swap", "add")[n % 2],
            "subtype": "obj",
        }
        for n in range(3)
    ]
    if form == "hub":
        write_table(folder / "data" / "test-00000-of-00001.parquet", rows, pictures=["image", "negative_image"])
    else:
        for n, row in enumerate(rows):
            row["image"] = put(folder / "pictures" / f"{n}.png", row["image"])
            row["negative_image"] = put(folder / "pictures" / f"{n}_negative.png", row["negative_image"])
        write_json(folder / "bivlc.json", rows)


def valse(folder: Path, form: str) -> None:
    """The third instance of each instrument was confirmed by one annotator only."""
    instruments = {"existence": "existence", "counting-hard": "counting", "foil-it": "noun phrases"}
    rows = [
        {
            "instrument": instrument,
            "phenomenon": phenomenon,
            "number": 60 + 10 * place + n,
            "caption": f"There are {n} cups, {instrument}",
            "foil": f"There are no cups {n}, {instrument}",
            "votes": 3 - n,
        }
        for place, (instrument, phenomenon) in enumerate(instruments.items())
        for n in range(3)
    ]
    for row in rows:
        put(folder / "images" / f"v7w_{row['number']}.jpg", row["number"])
    if form == "json":
        for instrument in instruments:
            entries = {
                f"{instrument}_visual7w_{row['number']}": {
                    "dataset": "visual7w",
                    "original_split": "test",
                    "linguistic_phenomena": row["phenomenon"],
                    "image_file": f"v7w_{row['number']}.jpg",
                    "caption": row["caption"],
                    "classes": 0,
                    "classes_foil": [2, 1],
                    "mturk": {"foil": 0, "caption": row["votes"], "other": 3 - row["votes"]},
                    "foil": row["foil"],
                }
                for row in rows
                if row["instrument"] == instrument
            }
            write_json(folder / "data" / f"{instrument}.json", entries)
    else:
        lines = [
            {
                "image_file_name": f"v7w_{row['number']}.jpg",
                "positive_caption": [row["caption"]],
                "negative_caption": [row["foil"]],
                "original_file_name": row["instrument"],
                "key": str(row["number"]),
                "linguistic_phenomena": row["phenomenon"],
            }
            for row in rows
            if row["votes"] >= 2
        ]
        write_lines(folder / "examples.jsonl", lines)


def aro(folder: Path, task: str, form: str, *, count: int = 3) -> None:
    """VG-Relation or VG-Attribution; the part that is asked about is the right half of each picture."""
    rows: list[dict[str, Any]] = []
    for n in range(count):
        row: dict[str, Any] = {"image_id": 900 + n, "number": 90 + n}
        if task == "relation":
            row |= {"relation_name": ("holding", "next to")[n % 2], "true_caption": f"the man is holding the cup {n}"}
            row |= {"false_caption": f"the cup {n} is holding the man"}
        else:
            row |= {"attributes": ["red", "open"], "true_caption": f"the red cup {n} and the open door"}
            row |= {"false_caption": f"the open cup {n} and the red door"}
        rows.append(row)
    if form == "json":
        for row in rows:
            path = folder / "images" / f"{row['image_id']}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = PIL.Image.new("RGB", (12, 10), (0, 0, 0))
            image.paste((row.pop("number"), 100, 200), (6, 0, 12, 10))
            image.save(path, "PNG")
            row |= {"image_path": path.name, "bbox_x": 6, "bbox_y": 1, "bbox_w": 6, "bbox_h": 8}
        write_json(folder / f"visual_genome_{task}.json", rows)
    else:  # the hub's pictures are the parts already
        told = "Relation" if task == "relation" else "Attribution"
        table = [{"image": r["number"], **{key: r[key] for key in ("true_caption", "false_caption")}} for r in rows]
        write_table(folder / f"ARO-Visual-{told}" / "data" / "test.parquet", table, pictures=["image"])


ORDERS = (
    "a brown dog runs on wet sand",
    "a wet dog runs on brown sand",
    "runs a on brown wet dog sand",
    "brown a dog on runs wet sand",
    "on wet runs a brown dog sand",
)


def coco_order(folder: Path, form: str) -> None:
    if form == "hub":
        keys = ("correct_caption", "hard_text_1", "hard_text_2", "hard_text_3", "hard_text_4")
        rows = [{"images": 110 + n, **dict(zip(keys, ORDERS, strict=True))} for n in range(2)]
        write_table(folder / "ARO-COCO-order" / "data" / "test.parquet", rows, pictures=["images"])
    elif form == "options":
        options = [{"image_options": 110 + n, "caption_options": list(ORDERS)} for n in range(2)]
        write_table(folder / "whatsup_all" / "COCO_Order-00000-of-00001.parquet", options, pictures=["image_options"])
    else:
        split = []
        for n in range(2):
            name = put(folder / "coco" / "val2014" / f"COCO_val2014_{n:012d}.jpg", 110 + n)
            split.append(
                {"image": f"val2014/{name}", "caption": [f"A brown dog, wet, runs on sand {m}." for m in range(5)]}
            )
        if form == "split":
            write_json(folder / "coco_karpathy_test.json", split)
        else:
            images = [
                {
                    "filepath": "val2014",
                    "filename": row["image"].partition("/")[2],
                    "split": part,
                    "sentences": [{"raw": text, "tokens": text.split()} for text in row["caption"]],
                }
                for row in split
                for part in ("train", "test")
            ]
            write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def whats_up_controlled(folder: Path, subset: str, form: str, *, things: Sequence[str] = ("cup", "book")) -> Path:
    """Sets of four pictures of two things; ``form`` is ``json`` or ``hub``; returns the file."""
    places = {
        "a": {"left_of": "to the left of", "right_of": "to the right of", "on": "on", "under": "under"},
        "b": {
            "left_of": "to the left of",
            "right_of": "to the right of",
            "in-front_of": "in front of",
            "behind": "behind",
        },
    }[subset]
    name = {"a": "controlled_images", "b": "controlled_clevr"}[subset]
    rows: list[dict[str, Any]] = []
    for number, thing in enumerate(things):
        texts = [f"A {thing} {words} a table" for words in places.values()]
        for n, place in enumerate(places):
            options = [texts[n], *(text for m, text in enumerate(texts) if m != n)]
            picture = 120 + 4 * number + n + (50 if subset == "b" else 0)
            if form == "json":
                file = put(folder / "data" / name / f"{thing}_{place}_table.jpeg", picture)
                rows.append({"image_path": f"data/{name}/{file}", "caption_options": options})
            else:
                rows.append({"image_options": picture, "caption_options": options})
    if form == "json":
        path = folder / "data" / f"{name}_dataset.json"
        write_json(path, rows)
    else:
        split = {"a": "Controlled_Images_A", "b": "Controlled_Images_B"}[subset]
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        write_table(path, rows, pictures=["image_options"])
    return path


def whats_up_lists(folder: Path, file: str) -> None:
    """``coco_qa_one_obj`` and its like: a list of lists."""
    number = 7
    if file.endswith("one_obj"):
        texts = ["A photo of a cup on the left", "A photo of a cup on the right"]
    else:
        texts = ["A photo of a cup to the left of a box", "A photo of a cup to the right of a box"]
    if file.startswith("coco"):
        put(folder / "data" / "val2017" / f"{number:012d}.jpg", 190)
    else:
        put(folder / "data" / "vg_images" / f"{number}.jpg", 191)
    write_json(folder / "data" / f"{file}.json", [[number, *texts], [8, *texts]])

"""Files that nearly say something else: what they say is read, or refused in words; never the next best thing."""

import csv
from pathlib import Path
from typing import Any

import captions_files as files
import numpy as np
import pytest
from captions_files import seen

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks.items import Benchmark, CaptionItem
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.benchmarks.search import find_benchmarks


def test_a_bare_number_is_a_picture_of_its_own_benchmark(tmp_path: Path):
    """Another benchmark's 139.jpg is another picture; shared ones, and those of --images, may lie elsewhere."""
    top = tmp_path / "all"
    annotations = top / "up" / "data"
    files.write_json(annotations / "rows.json", [])
    files.put(tmp_path / "outside" / "139.jpg", 2)

    def found(name: str, *images: Path) -> int:
        return seen(Pictures([top, *images]).find(name, near=annotations))

    # Beside annotations or in a folder of their own; or called after such a benchmark.
    files.write_json(top / "coco_order" / "rows.json", [])
    files.write_json(top / "mmb" / "parts" / "rows.json", [])
    (top / "mme").mkdir()
    (top / "mme" / "1.txt").write_text("Is it red?\tYes\n")
    for name in ("139.jpg", "frame_0001.jpg", "q12.png", "image(1).png", "images/cat.png"):
        for other in ("coco_order/images", "mmb/images", "mme", "mme_images"):
            file = top / other / Path(name).name
            files.put(file, 1)
            with pytest.raises(SampleError, match=rf"own folder \(.*/{other}/.*--images"):
                found(name)
            assert found(name, top / other) == 1
            file.unlink()
    assert found("139.jpg", tmp_path / "outside") == 2
    for folder in ("aro_images", "visual-genome/VG_100K", "media", "up/any"):  # no other benchmark's
        file = top / folder / "139.jpg"
        files.put(file, 3)
        assert found("139.jpg") == 3
        file.unlink()
    # LLaVA's files for GQA and MME lie above the authors' own.
    files.write_json(annotations / "deep" / "data" / "rows.json", [])
    files.write_json(annotations / "deep" / "posters" / "rows.json", [])
    files.put(annotations / "deep" / "data" / "images" / "139.jpg", 5)
    files.put(annotations / "deep" / "posters" / "7.jpg", 6)
    above = Pictures([top])
    assert seen(above.find("139.jpg", near=annotations / "deep")) == 5
    assert seen(above.find("posters/7.jpg", near=annotations / "deep")) == 6
    files.put(top / "139.jpg", 4)
    assert found("139.jpg") == 4
    files.write_json(top / "rows.json", [])  # it is of this one
    with pytest.raises(SampleError, match="own folder"):
        found("139.jpg")


def test_a_folder_that_tells_pictures_apart_is_never_another_one(tmp_path: Path):
    """Names, numbered folders and COCO's number under pos/ are no pictures of neg/; archives may be called anything."""
    names = ["pos/cat.jpg", "neg/cat.jpg", "COCO/000000000139.jpg", "fake/000000000139.jpg", "1/a.png", "2/a.png"]
    files.write_json(tmp_path / "rows.json", [{"image": name} for name in [*names, "documents/page_7.png"]])
    for number, name in enumerate(names[::2], 1):
        files.put(tmp_path / name, number)
    files.put(tmp_path / "unpacked" / "page_7.png", 9)
    pictures = Pictures([tmp_path])
    assert [seen(pictures.find(name, near=tmp_path)) for name in names[::2]] == [1, 2, 3]
    for name in names[1::2]:
        with pytest.raises(SampleError, match=f"no picture '{name}' .*in a folder of another name"):
            pictures.find(name, near=tmp_path)
    assert seen(pictures.find("documents/page_7.png", near=tmp_path)) == 9
    with pytest.raises(SampleError, match="in a folder of another name"):  # what a table names is not known
        pictures.find("scans/page_7.png", near=tmp_path)


def test_a_number_of_coco_is_no_picture_of_visual_genome(tmp_path: Path):
    files.put(tmp_path / "vg" / "139.jpg", 1)
    with pytest.raises(SampleError, match="no picture of the number 139"):
        Pictures([tmp_path]).numbered(139, near=tmp_path)
    files.put(tmp_path / "val2014" / "COCO_val2014_000000000139.jpg", 2)
    files.write_json(tmp_path / "coco" / "rows.json", [])
    assert seen(Pictures([tmp_path]).numbered(139, near=tmp_path / "coco")) == 2


def only(folder: Path) -> Benchmark:
    (benchmark,) = find_benchmarks(folder).benchmarks.values()
    return benchmark


def told(benchmark: Benchmark) -> list[tuple[str, tuple[str, ...], int]]:
    items = [item for item in benchmark.items if isinstance(item, CaptionItem)]
    return [(item.kind, item.captions, seen(item.images[0])) for item in items]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)


def test_a_true_label_is_read_by_its_name_and_a_mere_number_is_refused(tmp_path: Path):
    """The right caption is the second of the labels in every other row."""
    rows = [
        {"image": n, "tested_labels": [f"wrong {n}", f"right {n}"][:: 1 - 2 * (n % 2)], "true_label": f"right {n}"}
        for n in range(4)
    ]
    files.write_table(tmp_path / "a" / "SugarCrepe_swap_obj.parquet", rows, pictures=["image"], labels="true_label")
    assert told(only(tmp_path / "a")) == [("swap_obj", (f"right {n}", f"wrong {n}"), n) for n in range(4)]
    for row in rows:
        row["true_label"] = row["tested_labels"].index(row["true_label"])
    files.write_table(tmp_path / "b" / "SugarCrepe_swap_obj.parquet", rows, pictures=["image"])
    refused = only(tmp_path / "b")
    assert not refused.items
    assert "'true_label' is 1, and the table does not say which caption" in refused.left_out["swap_obj/0"]


def test_numbers_and_lists_that_tables_hold_as_text_are_those(tmp_path: Path):
    """CSV of ARO, and of What's Up; COCO's numbers; VLMEvalKit's cells that are the index of another row."""
    files.aro(tmp_path / "aro", "attribution", "json")
    path = tmp_path / "aro" / "visual_genome_attribution.json"
    expected = told(only(tmp_path / "aro"))
    write_csv(path.with_suffix(".tsv"), files.read_json(path))
    path.unlink()
    assert told(only(tmp_path / "aro")) == expected
    rows = files.read_json(files.whats_up_controlled(tmp_path / "up", "a", "json"))
    expected = told(only(tmp_path / "up"))
    for row in rows[::2]:  # as pandas writes an array
        row["caption_options"] = str(np.array(row["caption_options"], dtype=object))
    write_csv(tmp_path / "up" / "data" / "controlled_images.csv", rows)
    (tmp_path / "up" / "data" / "controlled_images_dataset.json").unlink()
    assert told(only(tmp_path / "up")) == expected

    pair = {"caption": "a", "negative_caption": "b"}
    files.put(tmp_path / "sugar" / "val2017" / "000000000139.jpg", 5)
    numbers = [{"filename": 139, **pair}, {"image_id": 139, **pair}, {"image_id": "139", **pair}]
    files.write_json(tmp_path / "sugar" / "data" / "swap_obj.json", numbers)
    assert told(only(tmp_path / "sugar")) == [("swap_obj", ("a", "b"), 5)] * 3
    cells = [files.base64_png(7), "10"]
    indexed = [{"index": 10 + n, "image": cell, **pair, "category": "swap_obj"} for n, cell in enumerate(cells)]
    (tmp_path / "kit").mkdir()
    write_csv(tmp_path / "kit" / "SugarCrepe.tsv", indexed)
    assert told(only(tmp_path / "kit")) == [("swap_obj", ("a", "b"), 7)] * 2


def test_rows_tell_their_subset_before_files_and_folders_do(tmp_path: Path):
    image = {"image_file_name": files.put(tmp_path / "valse" / "a.jpg", 1)}
    pair = {"positive_caption": ["a"], "negative_caption": ["b"]}
    kinds = ["existence", "plurals", "counting-hard"]
    files.write_lines(
        tmp_path / "valse" / "relations" / "x.jsonl",
        [{**image, **pair, "original_file_name": k, "linguistic_phenomena": "x"} for k in kinds],
    )
    files.write_lines(
        tmp_path / "sugar" / "x.jsonl",
        [{"image": "a.jpg", "caption": "a", "negative_caption": "b", "foil": None, "foil_type": "replace relation"}],
    )
    files.write_json(
        tmp_path / "whole" / "x.json",
        {
            kind: {"0": {"filename": "a.jpg", "caption": "a", "negative_caption": "b"}}
            for kind in ("add_att", "swap_obj")
        },
    )
    places = [f"A cup to the {side} of a crop top" for side in ("left", "right")]
    up = [
        {"image_path": "a.jpg", "caption_options": places, "subset": name}
        for name in ("COCO_QA_one_obj", "VG_QA_two_obj")
    ]
    files.write_lines(tmp_path / "up" / "x.jsonl", up)
    lists = [[1, *places], [1, "A car on the left", "A car on the right"], [1, "A cup", "A box"], [1]]
    files.write_json(tmp_path / "lists" / "coco_qa_two_obj.json", lists)
    files.put(tmp_path / "lists" / "000000000001.jpg", 1)
    for folder in ("sugar", "whole", "up"):
        files.put(tmp_path / folder / "a.jpg", 1)
    found = {
        folder: [kind for kind, *_ in told(only(tmp_path / folder))] for folder in ("valse", "sugar", "whole", "up")
    }
    assert found == {
        "valse": kinds,
        "sugar": ["replace_rel"],
        "whole": ["add_att", "swap_obj"],
        "up": ["coco-one", "gqa-two"],
    }
    odd = only(tmp_path / "lists")  # asked like the others, but for what is no entry
    assert [item.item_id for item in odd.items] == ["coco-two/0", "coco-two/1", "coco-two/2"]
    assert len(odd.left_out) == 1


def test_places_in_the_names_of_things_are_no_places(tmp_path: Path):
    """A left shoe is to the right of things, and one set of four."""
    files.whats_up_controlled(tmp_path, "a", "json", things=["left shoe", "tank top", "hat on a stand"])
    items = only(tmp_path).items
    assert {item.kind for item in items} == {"controlled-a"}
    assert [item.extra["place"] for item in items] == ["left", "right", "on", "under"] * 3
    assert len({item.group for item in items}) == 3


def test_rows_that_contradict_themselves_are_left_out(tmp_path: Path):
    options = ["A cup on a table", "A cup under a table"]
    cup = {"caption_options": options, "image_path": "a.jpg"}
    named = files.put(tmp_path / "controlled_images" / "cup_under_table.jpeg", 2)
    files.put(tmp_path / "a.jpg", 1)
    rows = [
        cup,
        {**cup, "answer": 0},
        {**cup, "answer": options[0]},
        {**cup, "answer": 1},
        {**cup, "label": options[1]},
        {"caption_options": options, "file_name": f"controlled_images/{named}"},
    ]
    files.write_json(tmp_path / "controlled_images_dataset.json", rows)
    benchmark = only(tmp_path)
    assert len(benchmark.items) == 3
    assert [why.partition(": ")[2][:12] for why in benchmark.left_out.values()] == [
        "'answer' is ",
        "'label' is '",
        "the picture ",
    ]


@pytest.mark.parametrize(
    ("key", "first", "others"),
    [
        ("answer", [0, 0.0, "a", "A.", "(A)", [0], "A cup on a table."], [1, "B", ["C"], "A cup under a table"]),
        ("gold_label", ["on", "A"], ["under", "unclear"]),
        ("correctOptionIndex", ["0", "0.0"], [2]),
        ("groundtruth", ["A"], ["B"]),
        ("solution", ["a cup on a table"], ["B"]),
        ("correct_caption", ["A cup on a table"], ["A cup under a table"]),
        ("answer_type", ["B", "place"], []),
    ],
)
def test_what_says_which_option_is_right_is_told_by_the_words_of_its_key(
    tmp_path: Path, key: str, first: list[Any], others: list[Any]
):
    cup = {"caption_options": ["A cup on a table", "A cup under a table"], "image": files.put(tmp_path / "a.jpg", 1)}
    files.write_json(tmp_path / "controlled_images.json", [{**cup, "id": str(v), key: v} for v in first + others])
    benchmark = only(tmp_path)
    assert [item.item_id.partition("/")[2] for item in benchmark.items] == list(map(str, first))
    assert all(f"{key!r} is " in why for why in benchmark.left_out.values())


@pytest.mark.parametrize(
    "keys",
    [
        ("image_file_name", "negative_image_file_name"),
        ("file_name", "negative_file_name"),
        ("image", "neg_image"),
        ("image", "image_2"),
        ("image", "edited_image"),
        ("filename", "generated"),
        ("filename", "img2"),
    ],
)
def test_a_second_picture_is_never_passed_over(tmp_path: Path, keys: tuple[str, str]):
    """It is BiVLC's, under any key that says so; another one leaves its row out. One file is no two pictures."""
    captions = {"caption": "a", "negative_caption": "b", "type": "swap", "subtype": "obj"}
    named = [files.put(tmp_path / f"{n}.png", n) for n in (1, 2)]
    files.write_lines(tmp_path / "metadata.jsonl", [{**dict(zip(keys, named, strict=True)), **captions}])
    benchmark = only(tmp_path)
    bivlc = benchmark.layout == "bivlc"
    assert bivlc == any(word in keys[1] for word in ("neg", "2"))
    items = [item for item in benchmark.items if isinstance(item, CaptionItem)]
    assert [[seen(image) for image in item.images] for item in items] == ([[1, 2]] if bivlc else [])
    files.write_lines(tmp_path / "metadata.jsonl", [{**dict.fromkeys(keys, "1.png"), **captions}])
    if bivlc:
        assert "is both its pictures" in next(iter(only(tmp_path).left_out.values()))


def test_one_odd_row_changes_neither_the_layout_nor_the_others(tmp_path: Path):
    image = {"image": files.put(tmp_path / "a.jpg", 1)}
    files.put(tmp_path / "val2014" / "000000000007.jpg", 7)
    five = [f"a man with a hat on a moped {n}" for n in range(5)]
    up = {"positive_caption": "A cup on the left", "negative_caption": "A cup on the right", **image}
    sugar = {"caption": "a", "negative_caption": "b"}
    cases: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
        "sugarcrepe": ({**sugar, **image}, [{"foil": "x"}, {"correct": 1}, {"caption2": "x"}, {"messages": []}]),
        "sugarcrepe ": ({**sugar, "image_id": 7}, [{"image_id": None}]),
        "whats-up": ({**up, "original_file_name": "COCO_QA_one_obj"}, [{"original_file_name": ""}]),
        "aro-order": (
            {"image": "COCO_val2014_000000000007.jpg", "caption": five},
            [{"caption": five[:4]}, {"image_id": 7}],
        ),
    }
    for number, (layout, (row, odd)) in enumerate(cases.items()):
        for place, change in enumerate(odd):
            folder = tmp_path / f"{number}.{place}"
            files.write_json(folder / "rows.json", [{**row, **(change if n == 2 else {})} for n in range(8)])
            files.put(folder / "a.jpg", 1)
            (found,) = find_benchmarks(folder, images=[tmp_path / "val2014"]).benchmarks.values()
            assert found.layout == layout.strip()
            assert len(found.items) + len(found.left_out) in (8, 39, 40)
            assert len(found.items) >= 7
    kinds = ["counting_hard", "counting_adversarial", "counting_small_quant"]
    valse = [{"caption": "a", "foil": "b", "any": kind, "phenomenon": "counting", **image} for kind in kinds]
    files.write_lines(tmp_path / "valse" / "rows.jsonl", valse)
    files.put(tmp_path / "valse" / "a.jpg", 1)
    assert [kind for kind, *_ in told(only(tmp_path / "valse"))] == [kind.replace("_", "-") for kind in kinds]


def test_karpathys_other_splits_are_not_called_coco_or_flickr30k(tmp_path: Path):
    entry = {"filename": files.put(tmp_path / "a.jpg", 1), "split": "test", "sentences": [{"raw": "a man with a hat"}]}
    for name in ("flickr8k", "vizwizcaps", "coco"):
        images = [entry, entry, {"filename": "a.jpg"}]
        files.write_json(tmp_path / f"{name}.json", {"images": images, "dataset": name})
    found = find_benchmarks(tmp_path)
    assert [(each.title, len(each.items), len(each.left_out)) for each in found.benchmarks.values()] == [
        ("ARO: COCO-Order", 2, 1)
    ]
    assert sorted(found.unread) == ["flickr8k.json", "vizwizcaps.json"]


def test_near_misses_are_refused(tmp_path: Path):
    """Captions of other data sets, preferences, pictures of BiVLC that are missing, boxes of no size."""
    image = {"image": files.put(tmp_path / "a.jpg", 1)}
    pair = {**image, "caption": "a", "negative_caption": "b"}
    files.write_json(tmp_path / "nocaps.json", [{**image, "caption": ["a cat", "a dog on a mat"]}])
    files.write_json(tmp_path / "photos.json", [{**image, "caption": ["a dog on a mat"] * 10}])
    files.write_json(tmp_path / "preferences.json", [{**pair, "question": "q", "chosen": "c", "rejected": "d"}])
    files.write_json(tmp_path / "bivlc.json", [{**pair, "negative_image": None}])
    box = {"relation_name": "on", "true_caption": "a on b", "false_caption": "b on a", "bbox_x": 1, "bbox_y": 1}
    files.write_json(tmp_path / "rel.json", [{**image, **box, "bbox_w": w, "bbox_h": 2} for w in (0, -5, "x", 3)])
    found = find_benchmarks(tmp_path)
    assert sorted(found.unread) == ["nocaps.json", "photos.json", "preferences.json"]
    assert sorted((name, len(each.items), len(each.left_out)) for name, each in found.benchmarks.items()) == [
        ("aro-relation", 1, 3),
        ("bivlc", 0, 1),
    ]

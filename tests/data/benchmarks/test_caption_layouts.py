"""Caption benchmarks open in every form that they are published in, and what cannot be asked is said."""

import json
from collections import Counter
from pathlib import Path

import captions_files as files
import PIL.Image
import pytest
from captions_files import seen

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks.caption_rows import Crop
from vlm_distill_cache.data.benchmarks.captions_of_relations import plain_caption, shuffled_captions
from vlm_distill_cache.data.benchmarks.items import Benchmark, CaptionItem
from vlm_distill_cache.data.benchmarks.search import find_benchmarks
from vlm_distill_cache.data.images.load import ImageFile


def only(folder: Path) -> Benchmark:
    found = find_benchmarks(folder)
    assert not found.unread
    (benchmark,) = found.benchmarks.values()
    return benchmark


def items_of(benchmark: Benchmark) -> list[CaptionItem]:
    items = [item for item in benchmark.items if isinstance(item, CaptionItem)]
    assert len(items) == len(benchmark.items)
    assert len({item.item_id for item in items}) == len(items)
    return items


def told(benchmark: Benchmark) -> list[tuple]:
    """What items say, without ids, in an order of its own; their pictures by number."""
    return sorted((item.kind, item.captions, item.fits, tuple(map(seen, item.images))) for item in items_of(benchmark))


@pytest.mark.parametrize("form", ["json", "hub", "table", "copy", "csv"])
def test_sugarcrepe_is_the_same_in_all_its_forms(tmp_path: Path, form: str):
    files.sugarcrepe(tmp_path, form)
    benchmark = only(tmp_path)
    expected = [
        ("" if form == "table" else row["kind"], (row["right"], row["wrong"]), ((True, False),), (row["number"],))
        for row in files.sugar_rows()
    ]
    assert (benchmark.name, benchmark.metric) == ("sugarcrepe", "sugarcrepe")
    assert told(benchmark) == sorted(expected)
    assert bool(benchmark.notes) == (form == "table")  # which tells no subsets
    assert not benchmark.left_out


@pytest.mark.parametrize("form", ["json", "copy", "table"])
def test_sugarcrepe_plus_plus_has_two_right_captions_in_all_its_forms(tmp_path: Path, form: str):
    files.sugarcrepe_pp(tmp_path, form)
    benchmark = only(tmp_path)
    assert benchmark.metric == "sugarcrepe-pp"
    assert len(benchmark.items) == 4
    first = told(benchmark)[0]
    assert first == (
        "replace_obj",
        ("A red cup 0, replace_obj", "Cup 0 is red, replace_obj", "A blue cup 0, replace_obj"),
        ((True, True, False),),
        (30,),
    )


@pytest.mark.parametrize("form", ["json", "hub"])
@pytest.mark.parametrize("name", ["winoground", "bivlc"])
def test_two_pictures_and_two_captions_fit_crosswise(tmp_path: Path, name: str, form: str):
    getattr(files, name)(tmp_path, form)
    benchmark = only(tmp_path)
    assert benchmark.name == benchmark.metric == name
    first = items_of(benchmark)[0]
    assert first.fits == ((True, False), (False, True))
    assert tuple(map(seen, first.images)) == ((40, 41) if name == "winoground" else (50, 51))
    assert first.captions[0] == ("dog 0 chases a cat" if name == "winoground" else "cup 0 is left of a box")
    assert first.kind == ("Object" if name == "winoground" else "swap")


@pytest.mark.parametrize("form", ["json", "copy"])
def test_valse_asks_what_two_of_three_annotators_confirmed(tmp_path: Path, form: str):
    files.valse(tmp_path, form)
    benchmark = only(tmp_path)
    assert Counter(item.kind for item in benchmark.items) == {"existence": 2, "counting-hard": 2, "foil-it": 2}
    assert told(benchmark)[0] == (
        "counting-hard",
        ("There are 0 cups, counting-hard", "There are no cups 0, counting-hard"),
        ((True, False),),
        (70,),
    )
    assert benchmark.notes[0].startswith("3 instances are not asked" if form == "json" else "some rows have no")


@pytest.mark.parametrize("form", ["json", "hub"])
@pytest.mark.parametrize("task", ["relation", "attribution"])
def test_aro_shows_the_part_that_is_asked_about(tmp_path: Path, task: str, form: str):
    files.aro(tmp_path, task, form)
    benchmark = only(tmp_path)
    assert benchmark.name == benchmark.metric == f"aro-{task}"
    item = items_of(benchmark)[0]
    assert seen(item.images[0]) == 90  # the right half; the left one is black
    assert item.fits == ((True, False),)
    assert item.kind == ("" if form == "hub" else {"relation": "holding", "attribution": "red_open"}[task])
    assert [note.partition(",")[0] for note in benchmark.notes] == (
        [f"rows without {'relation_name' if task == 'relation' else 'attributes'!r}"]
        if form == "hub"
        else ["no pair of attributes has the 25 items from which on it counts as published"]
        if task == "attribution"
        else []
    )


def test_a_part_is_cut_once_and_never_from_outside(tmp_path: Path):
    path = tmp_path / "a.png"
    image = PIL.Image.new("RGB", (10, 8))
    image.putpixel((4, 3), (9, 9, 9))
    image.save(path)
    assert Crop(ImageFile(path), (4, 3, 2, 2)).load().getpixel((0, 0)) == (9, 9, 9)
    assert Crop(ImageFile(path), (40, 30, 10, 8)).load().size == (10, 8)  # is the part already
    with pytest.raises(SampleError, match=r"10 x 8 pixels.* 9 x 2 at 10, 3"):
        Crop(ImageFile(path), (10, 3, 9, 2)).load()
    for size in (40, 20_000, 1e300):  # mostly black; more than Pillow makes
        with pytest.raises(SampleError, match="10 x 8 pixels"):
            Crop(ImageFile(path), (0, 0, size, size)).load()


@pytest.mark.parametrize("turned", range(1, 9))
def test_a_part_is_cut_as_pillow_cuts_it_from_the_file_as_it_lies(tmp_path: Path, turned: int):
    """ARO's own way, before EXIF's turn, black outside: compared for every turn and boxes that reach out of it."""
    path = tmp_path / "a.png"
    exif = PIL.Image.Exif()
    exif[0x0112] = turned
    stored = PIL.Image.effect_noise((9, 7), 90).convert("RGB")
    stored.save(path, exif=exif)
    for left, top, width, height in (
        (0, 0, 3, 2),
        (5, 4, 20, 9),
        (-2, -1, 4, 3),
        (1.4, 2.6, 3.2, 2.9),
        (0, 0, 9, 7),
        (2, 0, 7, 9),
    ):
        expected = stored.crop((left, top, left + width, top + height))
        found = Crop(ImageFile(path), (left, top, width, height)).load()
        assert (found.size, found.tobytes()) == (expected.size, expected.tobytes())


@pytest.mark.parametrize("form", ["hub", "options", "split", "karpathy"])
def test_coco_order_ranks_one_right_order_first(tmp_path: Path, form: str):
    files.coco_order(tmp_path, form)
    benchmark = only(tmp_path)
    assert benchmark.metric == "aro-order"
    item = items_of(benchmark)[0]
    assert seen(item.images[0]) == 110
    assert item.fits == ((True, *[False] * (len(item.captions) - 1)),)
    if form in ("split", "karpathy"):
        assert (benchmark.name, len(benchmark.items)) == ("aro-coco-order-split", 10)
        assert item.captions[0] == "a brown dog, wet, runs on sand 0"
        assert "two of the published four" in benchmark.notes[0]
    else:
        assert (benchmark.name, item.captions) == ("aro-coco-order", files.ORDERS)


def test_orders_that_are_made_keep_the_words_and_differ():
    caption = plain_caption('A "brown" dog.  runs;  ON sand, with me!')
    assert caption == "a brown dog runs on sand, with me"
    assert len(plain_caption(" ".join(map(str, range(50)))).split()) == 30
    within, between = shuffled_captions(caption, "one seed")
    assert [within, between] == shuffled_captions(caption, "one seed")
    words = caption.split()
    assert sorted(within.split()) == sorted(between.split()) == sorted(words)
    groups = [words[:3], words[3:6], words[6:]]
    assert [sorted(within.split()[n : n + 3]) for n in (0, 3, 6)] == [sorted(group) for group in groups]
    assert all(" ".join(group) in between for group in groups)
    assert caption not in (within, between)
    assert shuffled_captions("dog", "x") == []


@pytest.mark.parametrize("form", ["json", "hub"])
def test_whats_up_joins_four_pictures_of_two_things(tmp_path: Path, form: str):
    for subset in "ab":
        files.whats_up_controlled(tmp_path, subset, form)
    benchmark = only(tmp_path)
    items = items_of(benchmark)
    assert Counter(item.kind for item in items) == {"controlled-a": 8, "controlled-b": 8}
    assert sorted(Counter(item.group for item in items).values()) == [4, 4, 4, 4]
    first = [item for item in items if item.kind == "controlled-a"]
    assert [item.extra["place"] for item in first[:4]] == ["left", "right", "on", "under"]
    assert {item.extra["place"] for item in items if item.kind == "controlled-b"} == {
        "left",
        "right",
        "front",
        "behind",
    }
    assert [seen(first[3].images[0]), first[3].captions[0]] == [123, "A cup under a table"]


def test_whats_up_lists_tell_whose_numbers_they_hold(tmp_path: Path):
    for file in ("coco_qa_one_obj", "coco_qa_two_obj", "vg_qa_one_obj", "vg_qa_two_obj"):
        files.whats_up_lists(tmp_path, file)
    benchmark = only(tmp_path)
    shown = {item.kind: seen(item.images[0]) for item in items_of(benchmark)}
    assert shown == {"coco-one": 190, "coco-two": 190, "gqa-one": 191, "gqa-two": 191}
    assert sorted(benchmark.left_out) == [f"{kind}/1" for kind in sorted(shown)]  # number 8 is not there
    assert "000000000008" in benchmark.left_out["coco-one/1"]

    (tmp_path / "data" / "coco_qa_one_obj.json").rename(tmp_path / "data" / "entries.json")
    found = find_benchmarks(tmp_path)
    assert "both are there; call it coco_... or vg_..." in found.unread["data/entries.json"]
    (tmp_path / "data" / "vg_images" / "7.jpg").unlink()
    again = find_benchmarks(tmp_path).benchmarks["whats-up"]
    assert "coco-one" in {item.kind for item in again.items}  # only COCO's picture is there


def test_files_that_hold_captions_otherwise_are_not_taken_for_benchmarks(tmp_path: Path):
    pair = {"filename": files.put(tmp_path / "1.jpg", 1), "caption": "a", "negative_caption": "b"}
    files.write_json(tmp_path / "answers.json", {"0": {**pair, "answer": {"free_form_answer": "(1)"}, "correct": True}})
    files.write_json(tmp_path / "texts.json", [{"caption": "a", "negative_caption": "b", "image_id": "x"}])
    files.write_json(tmp_path / "training.json", [{"image": "1.jpg", "caption": "a", "image_id": "1"}])
    options = ["the man is holding the cup", "the cup is holding the man"]
    files.write_json(tmp_path / "VG_Relation.json", [{"image_path": "1.jpg", "caption_options": options}])
    found = find_benchmarks(tmp_path)
    assert not found.benchmarks
    assert "its rows have answer, correct, too" in found.unread["answers.json"]
    assert "no known layout" in found.unread["texts.json"]
    assert "do not say which one is right" in found.unread["VG_Relation.json"]


def test_a_row_that_cannot_be_read_is_left_out_alone(tmp_path: Path):
    files.sugarcrepe(tmp_path, "csv")
    path = tmp_path / "test_SugarCrepe.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '"one cell"', *lines[1:]]) + "\n")
    benchmark = only(tmp_path)
    assert len(benchmark.items) == len(lines) - 1
    assert [why.partition(":")[0] for why in benchmark.left_out.values()] == ["test_SugarCrepe.csv, row 1"]


def test_two_editions_of_a_benchmark_are_never_mixed(tmp_path: Path):
    for edition in ("data", "data_unrefined"):
        files.sugarcrepe(tmp_path / "one", "json")
        (tmp_path / "one" / "data").rename(tmp_path / edition)
    (tmp_path / "data" / "swap_obj.json").unlink()  # a subset that only the other edition has stays there
    (tmp_path / "data" / "swap_att.json").unlink()
    found = find_benchmarks(tmp_path)
    assert sorted(found.benchmarks) == ["sugarcrepe-data", "sugarcrepe-data_unrefined"]
    assert [len(found.benchmarks[name].items) for name in sorted(found.benchmarks)] == [10, 14]
    assert len({benchmark.fingerprint for benchmark in found.benchmarks.values()}) == 2


def test_an_item_that_cannot_be_asked_is_left_out_with_its_reason(tmp_path: Path):
    path = tmp_path / "swap_obj.json"
    right = {"filename": files.put(tmp_path / "a" / "1.jpg", 1), "caption": "a", "negative_caption": "b"}
    entries = {
        "0": right,
        "1": {**right, "filename": "2.jpg"},
        "2": {**right, "negative_caption": " "},
        "3": {**right, "filename": None},
        "4": {**right, "caption": ["a", "c"]},
    }
    path.write_text(json.dumps(entries))
    benchmark = only(tmp_path)
    assert [item.item_id for item in benchmark.items] == ["swap_obj/0"]
    assert list(benchmark.left_out) == [f"swap_obj/{n}" for n in range(1, 5)]
    assert "swap_obj.json, row 2: no picture '2.jpg'" in benchmark.left_out["swap_obj/1"]
    assert "'negative_caption' must be a sentence" in benchmark.left_out["swap_obj/2"]
    assert "it has no picture under" in benchmark.left_out["swap_obj/3"]
    assert "'caption' or 'positive_caption' must be a sentence" in benchmark.left_out["swap_obj/4"]

    labels = [{"image": 1, "tested_labels": ["a", "b"], "true_label": "c"}]
    files.write_table(tmp_path / "hub" / "SugarCrepe_add_att" / "test.parquet", labels, pictures=["image"])
    hub = find_benchmarks(tmp_path / "hub").benchmarks["sugarcrepe"]
    assert "'true_label' 'c' is none of" in hub.left_out["add_att/0"]


ODD = (
    None,
    3,
    -1.5,
    True,
    "",
    "x" * 5000,
    "\x00",
    [],
    [None],
    {},
    {"path": 3},
    [[1]],
    ["a", "b", "c"],
    "http://x/y.jpg",
)
JSON_FORMS = {
    "sugarcrepe": ("json", "copy"),
    "sugarcrepe_pp": ("json", "copy"),
    "winoground": ("json",),
    "bivlc": ("json",),
    "valse": ("json", "copy"),
    "coco_order": ("split", "karpathy"),
}


def folders_of_json(root: Path) -> list[Path]:
    for maker, forms in JSON_FORMS.items():
        for form in forms:
            getattr(files, maker)(root / f"{maker}-{form}", form)
    files.aro(root / "relation", "relation", "json")
    files.aro(root / "attribution", "attribution", "json")
    files.whats_up_controlled(root / "up", "a", "json")
    files.whats_up_lists(root / "lists", "coco_qa_one_obj")
    return sorted(root.iterdir())


def spoiled(value: object, odd: object) -> list[object]:
    """The JSON with one value of its first entry replaced, or one entry, or all of it."""
    if isinstance(value, list):
        return [odd, *([part, *value[1:]] for part in spoiled(value[0], odd))] if value else [odd]
    if isinstance(value, dict):
        return [odd, *({**value, key: part} for key in list(value)[:12] for part in spoiled(value[key], odd))]
    return [odd]


def test_no_value_in_no_place_ends_the_search(tmp_path: Path):
    """Whatever stands where a published value should: the item is left out, or the file unread; nothing else happens."""
    tried = 0
    for folder in folders_of_json(tmp_path / "all"):
        (path, *_) = sorted(path for path in folder.rglob("*.json*"))
        lines = path.suffix == ".jsonl"
        text = path.read_text()
        for number, odd in enumerate(ODD):
            whole = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
            for place, bad in enumerate(spoiled(whole, odd)):
                if (place + number) % 5:  # a fifth of all, each place with some of the values
                    continue
                if lines and isinstance(bad, list):
                    path.write_text("".join(json.dumps(row) + "\n" for row in bad))
                else:
                    path.write_text(json.dumps(bad))
                found = find_benchmarks(folder)
                assert found.benchmarks or found.unread
                tried += 1
        path.write_text(text)
    assert tried > 200

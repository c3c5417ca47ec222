"""`make experiment-photos DATA=folder`: what is read of a folder, its splits, and what is asked about its pictures."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks.experiment_photos_folder import (
    CANDIDATES,
    DIFFERENT,
    FOLDER,
    OTHER,
    SIMILAR,
    SPLITS,
    SWAPPED,
    FolderData,
    Photographs,
    balanced,
    make_pairs,
    read_photographs,
    swap_things,
)
from tests.benchmarks.experiment_photos_scores import is_twin, scores_of
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import CaptionPair

PICTURES, THINGS = 120, ("cat", "dog", "apple", "boat", "bear", "car", "bird", "ball")


def captions_of(number: int) -> list[str]:
    """Two captions, the second of two words less."""
    first, second = THINGS[number % 8], THINGS[(number // 8 + 1) % 8]
    return [f"A small {first} above the large {second} .", f"a {first} above the {second}"]


def make_folder(folder: Path, layout: str, pictures: int = PICTURES) -> Path:
    """A folder of small noisy pictures of several sizes, with captions in a published layout."""
    folder.mkdir(parents=True)
    inside = folder / ("Images" if layout != "coco" else "train2017")
    inside.mkdir()
    names = [f"{number:04d}.jpg" for number in range(pictures)]
    generator = np.random.default_rng(0)
    for number, name in enumerate(names):
        pixels = generator.integers(0, 256, (20 + number % 3, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(inside / name)
    rows = [(name, said) for number, name in enumerate(names) for said in captions_of(number)]
    if layout == "coco":
        (folder / "annotations").mkdir()
        told = {
            "images": [{"id": 7 * number, "file_name": name} for number, name in enumerate(names)],
            "annotations": [{"image_id": 7 * names.index(name), "caption": said} for name, said in rows],
        }
        (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(told))
        (folder / "annotations" / "instances_train2017.json").write_text("[]")  # of other tasks: not read
    elif layout == "flickr8k":
        with (folder / "captions.txt").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])
    elif layout == "flickr8k, numbered":
        lines = [f"{name}#{number % 2}\t{said}" for number, (name, said) in enumerate(rows)]
        (folder / "Flickr8k.token.txt").write_text("\n".join(lines))
    elif layout == "jsonl":
        lines = [json.dumps({"image": f"Images/{name}", "caption": said}) for name, said in rows]
        (folder / "captions.jsonl").write_text("\n".join(lines))
    else:
        lines = [json.dumps({"file_name": name, "text": said}) for name, said in rows]
        (inside / "metadata.jsonl").write_text("\n".join(lines))
    return folder


LAYOUTS = ("coco", "flickr8k", "flickr8k, numbered", "jsonl", pytest.param("imagefolder", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Photographs:
    return read_photographs(make_folder(tmp_path_factory.mktemp("folder") / "photographs", "flickr8k"))


# What is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(tmp_path, photographs, layout):
    found = read_photographs(make_folder(tmp_path / "other", layout))
    assert found.fingerprint == photographs.fingerprint  # wherever the folder lies
    said = {path.name: captions for path, captions in found.captions.items()}
    assert said == {
        f"{number:04d}.jpg": [caption.rstrip(" .") for caption in captions_of(number)] for number in range(PICTURES)
    }


def test_a_caption_with_commas_and_quotes_stays_whole(tmp_path):
    folder = make_folder(tmp_path / "folder", "flickr8k")
    with (folder / "captions.txt").open("a", newline="") as file:
        csv.writer(file).writerow(("0003.jpg", 'A sign says "stop, here", twice'))
    (captions,) = [said for path, said in read_photographs(folder).captions.items() if path.name == "0003.jpg"]
    assert captions[-1] == 'A sign says "stop, here", twice'
    tabs = make_folder(tmp_path / "tabs", "flickr8k, numbered")
    with (tabs / "Flickr8k.token.txt").open("a") as file:
        file.write('\n0003.jpg#2\t" stop , she says .')
    (captions,) = [said for path, said in read_photographs(tabs).captions.items() if path.name == "0003.jpg"]
    assert captions[-1] == '" stop , she says'


def test_the_fingerprint_is_of_pictures_and_captions(tmp_path, photographs):
    folder = make_folder(tmp_path / "folder", "flickr8k")
    text = folder / "captions.txt"
    text.write_text(text.read_text().replace("0007.jpg,a", "0007.jpg,one", 1))
    assert read_photographs(folder).fingerprint != photographs.fingerprint
    text.write_text(text.read_text().replace("0007.jpg,one", "0007.jpg,a", 1))
    assert read_photographs(folder).fingerprint == photographs.fingerprint
    Image.new("RGB", (9, 9)).save(folder / "Images" / "0007.jpg")
    assert read_photographs(folder).fingerprint != photographs.fingerprint


def test_what_cannot_be_used_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="is no folder; name one that holds pictures"):
        read_photographs(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"captions\*\.txt, \.json"):
        read_photographs(tmp_path / "empty")
    with pytest.raises(SystemExit, match=r"30 different pictures with captions, expected 100 or more \(30 are named"):
        read_photographs(make_folder(tmp_path / "few", "coco", pictures=30))
    folder = make_folder(tmp_path / "broken", "flickr8k")
    (folder / "Images" / "0005.jpg").write_bytes(b"no picture")
    assert len(read_photographs(folder).captions) == PICTURES - 1
    assert "0005.jpg is passed over, it is no picture" in capsys.readouterr().out
    (folder / "small").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "small" / "0003.jpg")
    with pytest.raises(
        SystemExit, match=r"speak of 0003.jpg, and .*Images/0003.jpg and .*small/0003.jpg are called so"
    ):
        read_photographs(folder)


# Splits ------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_even_where_one_picture_has_two_names(tmp_path):
    folder = make_folder(tmp_path / "folder", "flickr8k")
    for number in range(PICTURES):  # each once more, under another name and with another caption
        (folder / "Images" / f"copy-{number}.jpg").write_bytes((folder / "Images" / f"{number:04d}.jpg").read_bytes())
        with (folder / "captions.txt").open("a") as file:
            file.write(f"copy-{number}.jpg,a copy of {number}\n")
    found = read_photographs(folder)
    contents = {split: [path.read_bytes() for path in found.split(split)] for split in SPLITS}
    assert {split: len(of) for split, of in contents.items()} == {
        "test": 12, "validation": 6, "students": 48, "teacher": 54,
    }  # fmt: skip
    assert len({content for of in contents.values() for content in of}) == PICTURES
    assert {len(said) for said in found.captions.values()} == {3}


def test_what_is_learnt_is_read_by_the_library_and_never_asked(tmp_path, photographs):
    data = FolderData(tmp_path / "data", images=60, taught=1000, items=4, shown=5)
    data.write(photographs)
    read = {part: list(open_dataset(getattr(data, part))) for part in ("students", "teacher", "held_out")}
    assert [len(samples) for samples in read.values()] == [60, 108, 5]
    shown = {part: {sample.images[0].path for sample in samples} for part, samples in read.items()}
    asked = {split: {pair.image.path for pair in data.pairs(split).pairs} for split in ("validation", "test")}
    assert shown["held_out"] <= set(photographs.split("test"))
    assert asked["test"] <= set(photographs.split("test"))
    parts = [shown["students"], shown["teacher"], asked["validation"], set(photographs.split("test"))]
    assert sum(map(len, parts)) == len(set().union(*parts))
    # First captions come first: of 60 of 96 the first one of all 48 pictures.
    assert len({sample.images[0].path for sample in read["students"][:48]}) == 48
    for sample in read["students"]:
        assert sample.turns[0].answer in photographs.captions[sample.images[0].path]
    assert SWAPPED not in {pair.kind for pair in data.pairs("validation").pairs}
    assert data.pairs("test", [0, 3]).pairs == tuple(data.pairs("test").pairs[place] for place in (0, 3))


def test_a_split_of_which_nothing_can_be_asked_is_refused(tmp_path):
    lengths = Photographs({Path(f"{n}.jpg"): [" ".join(["word"] * (n + 1))] for n in range(120)}, "")
    with pytest.raises(
        SystemExit, match="the validation split, 6 of 120 pictures, has no two with captions of equally"
    ):
        FolderData(tmp_path / "data", images=4, taught=4, items=4, shown=2).write(lengths)


# What is asked -----------------------------------------------------------------------------------------


def test_twins_are_captions_of_equal_length_that_language_alone_cannot_tell(photographs):
    captions = photographs.split("students")
    pairs = make_pairs(captions, 8)
    twins = [pair for pair in pairs if pair.kind != SWAPPED]
    assert [pair.kind for pair in twins] == [OTHER] * 8 + [SIMILAR] * 8
    for place, pair in enumerate(twins):
        assert is_twin(pairs, place)
        twin = twins[place ^ 1]
        assert twin.image != pair.image
        assert pair.right in captions[pair.image.path]
        assert pair.wrong in captions[twin.image.path]
        words, others = (caption.lower().split() for caption in (pair.right, pair.wrong))
        assert len(words) == len(others)
        assert len({*words} - {*others}) >= DIFFERENT
    for kind in (OTHER, SIMILAR):
        shown = [pair.image for pair in twins if pair.kind == kind]
        assert len(set(shown)) == len(shown)
    # A model without a picture prefers a caption whatever is shown: it has half of all twins right.
    prefers = {caption: number for number, caption in enumerate(sorted({pair.right for pair in twins}))}
    assert np.mean([prefers[pair.right] > prefers[pair.wrong] for pair in twins]) == 0.5


def test_similar_pictures_share_the_most_words():
    captions = {
        Path(f"{n}.jpg"): [said]
        for n, said in enumerate(
            ["a red cat sleeps here", "two men play some football", "a red dog runs here", "x y z u v"]
        )
    }
    pairs = [pair for pair in make_pairs(captions, 2) if pair.kind == SIMILAR]
    first = next(pair for pair in pairs if pair.item_id.endswith("-0"))
    words = {*first.right.split()}
    best = max(
        len(words & {*said.split()})
        for path, (said,) in captions.items()
        if path != first.image.path and len({*said.split()} - words) >= DIFFERENT and len({*said.split()}) == 5
    )
    assert len(words & {*first.wrong.split()}) == best


@pytest.mark.parametrize(
    ("caption", "swapped"),
    [
        ("A dog on a red couch", "A red couch on a dog"),
        ("A dog runs through the tall grass", "The tall grass runs through a dog"),
        ("a child in New York holds the umbrella", "the umbrella in New York holds a child"),
        ("Near the house, a boy feeds two ducks", "Near the house, two ducks feeds a boy"),
        ("the bus is behind a truck", "a truck is behind the bus"),
        ("a cat and a dog", None),  # says the same
        ("a cat beside the dog", None),
        ("a dog on a dog", None),
        ("children play outside", None),
        ("a dog", None),
    ],
)
def test_two_things_change_places(caption, swapped):
    assert swap_things(caption) == swapped


def test_captions_with_swapped_words_are_balanced_by_what_the_blind_model_says():
    def pair(kind: str, right: str, wrong: str) -> CaptionPair:
        return CaptionPair(item_id=right, image=ImageFile(Path("x")), right=right, wrong=wrong, kind=kind)

    pairs = [pair(OTHER, "a", "b"), pair(OTHER, "b", "a"), *(pair(SWAPPED, f"r{n}", f"w{n}") for n in range(9))]
    blind = {OTHER: "10", SWAPPED: "110=11011"}
    chosen = balanced(pairs, blind, most=100)
    assert chosen == [0, 1, 2, 3, 4, 8]  # both that are wrong, and as many of those that are right
    signs = "".join(blind[SWAPPED][place - 2] for place in chosen[2:])
    assert scores_of({SWAPPED: signs, "picture: " + OTHER: "11", OTHER: "10"}, FOLDER)[SWAPPED] == 50
    assert balanced(pairs, blind, most=2) == [0, 1, 2, 4]
    assert balanced(pairs, {OTHER: "10", SWAPPED: "1" * 9}, most=100) == [0, 1]  # nothing to balance with


def test_as_many_candidates_are_swapped_as_can_be_balanced(photographs):
    captions = photographs.split("students")
    assert sum(pair.kind == SWAPPED for pair in make_pairs(captions, 8)) == 8 * CANDIDATES
    assert sum(pair.kind == SWAPPED for pair in make_pairs(captions, 1000)) == 2 * len(captions)

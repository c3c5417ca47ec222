"""A mixture is its parts' samples, each once, dealt evenly; what stands in its file is read or refused."""

import json
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sample import Weighting, fingerprint_samples
from vlm_distill_cache.data.sources.grouping import group_by_image
from vlm_distill_cache.data.sources.kept import surveys
from vlm_distill_cache.data.sources.mixture import Part, deal, mixture_weights, read_mixture


def write(folder, name, ids, *, image=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"id": i, "question": f"{name} {i}?", "answer": "yes", **({"image": image} if image else {})} for i in ids
    ]
    path.write_text(json.dumps(entries))


def mixture(folder, text):
    path = folder / "mixture.yaml"
    path.write_text(text)
    return str(path)


def test_every_sample_of_every_part_once_from_the_files_folder(tmp_path, monkeypatch):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        PIL.Image.new("RGB", (4, 4 + (part == "b"))).save(tmp_path / part / "x.png")
        write(tmp_path, f"{part}.json", [f"{part}{i}" for i in range(4)], image="x.png")
    spec = mixture(tmp_path, "- data: a.json\n  images: a\n- {data: b.json, images: b, limit: 2}\n")
    monkeypatch.chdir("/")
    dataset = open_dataset(spec)
    assert sorted(dataset.sample_ids) == ["a0", "a1", "a2", "a3", "b0", "b1"]
    for sample in dataset:
        assert sample.images[0].load().size == (4, 4 + sample.sample_id.startswith("b"))
    assert dataset.origin == {"mixture": [{"name": "a.json", "samples": 4}, {"name": "b.json", "samples": 2}]}
    assert dataset.weighting() is None


def test_only_ids_that_parts_share_are_prefixed_and_always_alike(tmp_path):
    write(tmp_path, "a.json", ["x", "y"])
    write(tmp_path, "sub/a.json", ["x", "z"])
    spec = mixture(tmp_path, "- a.json\n- sub/a.json\n")
    expected = {"a.json/x": "a.json x?", "y": "a.json y?", "a.json#2/x": "sub/a.json x?", "z": "sub/a.json z?"}
    for _ in range(2):
        dataset = open_dataset(spec)
        assert {sample.sample_id: sample.turns[0].question for sample in dataset} == expected


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_every_stretch_holds_the_parts_by_their_sizes(sizes):
    order = deal(sizes)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    owners = np.repeat(np.arange(len(sizes)), sizes)[order]
    for length in range(1, len(order) + 1):
        for part, size in enumerate(sizes):
            count = int((owners[:length] == part).sum())
            assert abs(count - Fraction(size * length, sum(sizes))) <= 1 + len(sizes) / 2


def test_a_limit_takes_of_all_parts_and_evaluation_asks_of_all(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    write(tmp_path, "a.json", [f"a{i}" for i in range(40)], image="x.png")
    write(tmp_path, "b.json", [f"b{i}" for i in range(20)], image="x.png")
    spec = mixture(tmp_path, "- a.json\n- {data: b.json, weight: 3}\n")
    few = open_dataset(spec, limit=6)
    assert sorted(few.sample_ids) == ["a0", "a1", "a2", "a3", "b0", "b1"]
    assert few.weighting().repeats(0).tolist() == [3 if i.startswith("b") else 1 for i in few.sample_ids]
    questions = open_evaluation(spec, limit=6).questions
    assert sorted(item.question for item in questions)[-1] == "b.json b1?"


def test_samples_about_one_picture_are_grouped_in_their_part_alone(tmp_path):
    for part in "ab":
        (tmp_path / part).mkdir()
        PIL.Image.new("RGB", (4, 4 + (part == "b"))).save(tmp_path / part / "x.png")
        write(tmp_path, f"{part}.json", [f"{part}{i}" for i in range(3)], image="x.png")
    dataset = open_dataset(mixture(tmp_path, "- {data: a.json, images: a, weight: 2}\n- {data: b.json, images: b}\n"))
    grouped = group_by_image(dataset)
    assert list(grouped.sample_ids) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert grouped.fingerprint() == dataset.fingerprint()
    assert grouped.weighting().repeats(1).tolist() == [2, 2, 2, 1, 1, 1]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.tuples(*[st.floats(0.05, 3.5)] * 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_weights_are_kept_to_a_sample_and_the_same_samples_each_time(parts, weights, seed):
    weighting = Weighting(np.array(parts), weights)
    repeats = weighting.repeats(seed)
    assert np.array_equal(repeats, weighting.repeats(seed))
    for part, weight in enumerate(weights):
        mine = repeats[np.array(parts) == part]
        if len(mine):
            assert mine.max() - mine.min() <= 1
            assert mine.sum() >= 1
            assert abs(mine.sum() - weight * len(mine)) <= 0.5 + (weight < 1)


def test_weights_are_read_without_opening_data(tmp_path):
    assert mixture_weights(mixture(tmp_path, "- gone.json\n- {data: gone.json, weight: 0.5}\n")) == [1.0, 0.5]
    assert mixture_weights(mixture(tmp_path, "- gone.json\n")) is None
    assert mixture_weights("shapes") is None
    assert mixture_weights(None) is None


def test_names_and_places_of_parts(tmp_path):
    write(tmp_path, "org/name/x.json", ["a"])
    text = """
- shapes:images=3
- data: shapes
  split: test
- data: org/name/x.json
- data: org/other@main
  name: one
  split: train
  streaming: true
- data: org/v1.5
- /there.json
- data: tars/{0..3}.tar
  cache: c
"""
    with pytest.raises(DataError, match="entry 1 has no cache, others have"):
        read_mixture(tmp_path / mixture(tmp_path, text))
    parts = read_mixture(tmp_path / mixture(tmp_path, text.replace("  cache: c\n", "")))
    assert [(part.data, part.split) for part in parts] == [
        ("shapes:images=3", None),
        ("shapes", "test"),
        (str(tmp_path / "org/name/x.json"), None),
        ("org/other@main:name=one,split=train,streaming=true", None),
        ("org/v1.5", None),
        ("/there.json", None),
        (str(tmp_path / "tars/{0..3}.tar"), None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; a mixture is a list"),
        ("[]", "is empty; a mixture is a list"),
        ("a.json", "is no list; a mixture is a list"),
        ("data: a.json", r"is a mapping with \['data'\]; a mixture is a list"),
        ("datasets: [{data: a.json}]", "put what 'datasets' holds at the top"),
        ("- {data: a.json, wieght: 2}", "entry 1 has no option 'wieght'; did you mean 'weight'"),
        ("- {images: a}", "entry 1 names no data"),
        ("- {data: a.json, weight: 0}", "weight must be above 0, got 0"),
        ("- {data: a.json, weight: -1}", "weight must be above 0, got -1"),
        ("- {data: a.json, weight: .nan}", "weight must be above 0, got nan"),
        ("- {data: a.json, weight: .inf}", "weight must be above 0, got inf"),
        ("- {data: a.json, weight: '-1e3'}", "weight must be above 0, got -1000.0"),
        ("- {data: a.json, weight: twice}", "weight must be a number, got 'twice'"),
        ("- {data: a.json, weight: true}", "weight must be a number, got True"),
        ("- {data: a.json, limit: 0}", "limit must be at least 1"),
        ("- {data: a.json, limit: 1.5}", "limit must be a whole number"),
        ("- a.json\n- {data: b.json}", r"entry 2: data '.*b\.json' does not exist"),
        ("- a.json\n- other.yaml", "entry 2: other.yaml is a mixture itself"),
        ("- [a.json]", "entry 1 must hold data and its options, got list"),
        ("- {data: a.json, split: test}", r"a\.json has no option split"),
        ("- data: a.json\n images: b", r"is not YAML: line 2, column 2: [^\\]*$"),
        (
            "- data: a.json\n  weight: 2\n  data: b.json",
            "is not YAML: line 3, column 3: 'data' stands twice, first in line 1",
        ),
        ("- {data: a.json, path: x}", "entry 1 has no option 'path'. It has data, images"),
        ("- {data: shapes, name: x}", "entry 1: shapes has no option name; take name out"),
        ("- {data: 'shapes:images=3', images: img}", "entry 1: shapes has no option images"),
        ("- {data: easy-vqa, streaming: true}", "entry 1: easy-vqa has no option streaming"),
    ],
)
def test_what_is_no_mixture_is_refused(tmp_path, text, message):
    write(tmp_path, "a.json", ["x"])
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(mixture(tmp_path, text))
    assert "mixture.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("written", "weight"), [("1e3", 1000), ("1.5e-1", 0.15), ("2", 2), ("'2'", 2), ("0.5", 0.5)])
def test_a_weight_is_a_number_however_it_is_written(tmp_path, written, weight):
    write(tmp_path, "a.json", ["x"])
    assert [
        part.weight for part in read_mixture(tmp_path / mixture(tmp_path, f"- {{data: a.json, weight: {written}}}"))
    ] == [weight]


@given(st.none() | st.integers(1, 9), st.none() | st.integers(0, 9))
def test_the_smaller_limit_holds(own, given):
    limits = [limit for limit in (own, given) if limit]
    assert Part(data="x", limit=own).limit_within(given) == (min(limits) if limits else None)


def test_the_fingerprint_of_many_samples_is_made_once_and_is_that_of_a_look_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "near"))
    for name in ("a.json", "b.jsonl", "sub/a.json", "c.csv"):
        write(tmp_path, name, [f"{name[0]}{i}" for i in range(6)])
    (tmp_path / "b.jsonl").write_text('{"id": 1, "caption": "x"}\n{"id": 2, "caption": "y"}')
    (tmp_path / "c.csv").write_text("id,caption\n1,x\n")
    texts = [
        "- a.json\n- b.jsonl\n",
        "- b.jsonl\n- a.json\n",
        "- {data: a.json, limit: 3}\n- b.jsonl\n",
        "- {data: a.json, limit: 4}\n- b.jsonl\n",
        "- a.json\n- sub/a.json\n",
        "- a.json\n- c.csv\n",
    ]
    expected = [fingerprint_samples(open_dataset(mixture(tmp_path, text))) for text in texts]
    assert len({*expected}) == len(texts)
    assert not (tmp_path / "near").exists()
    monkeypatch.setattr(surveys, "SHARED_FROM", 0)
    monkeypatch.setattr(surveys.os, "sched_getaffinity", lambda _: {0})
    with monkeypatch.context() as once:
        for _ in range(2):
            found = [open_dataset(mixture(tmp_path, text)).fingerprint() for text in texts]
            assert found == expected
            once.setattr(surveys, "survey_samples", pytest.fail)
    write(tmp_path, "a.json", [f"a{i}" for i in range(7)])
    assert open_dataset(mixture(tmp_path, texts[0])).fingerprint() != expected[0]
    drawn = open_dataset(mixture(tmp_path, "- a.json\n- shapes:images=3\n"))
    kept = {*(tmp_path / "near").rglob("*.bin")}
    assert drawn.made_of() is None
    assert drawn.fingerprint() == fingerprint_samples(drawn)
    assert {*(tmp_path / "near").rglob("*.bin")} == kept

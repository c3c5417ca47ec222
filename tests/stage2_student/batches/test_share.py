"""A random share of samples: as a slow deal of shuffled sources finds it, the same in any order, in proportion, unbiased."""

import json
import tarfile
from fractions import Fraction
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage2_student.batches.share import draw_share

SOURCES = st.lists(st.integers(0, 4), min_size=1, max_size=40)


def deal_slowly(ids, sources, count, seed):
    """Of each source the next sample when it is most behind, until there are enough."""

    def number(text):
        return xxhash.xxh3_64_intdigest(f"{seed} {text}".encode())

    decks = {s: sorted((i for i, of in zip(ids, sources, strict=True) if of == s), key=number) for s in {*sources}}
    ranked = sorted(decks, key=lambda s: number(f"source of {decks[s][0]}"))
    within = {s: number(f"start of {decks[s][0]}") / 2.0**64 for s in ranked}
    offsets = {s: (place + within[s]) / len(ranked) for place, s in enumerate(ranked)}
    taken = dict.fromkeys(decks, 0)
    found = []
    for _ in range(count):
        left = [s for s in decks if taken[s] < len(decks[s])]
        s = min(left, key=lambda s: ((taken[s] + offsets[s]) / len(decks[s]), number(decks[s][taken[s]])))
        found.append(decks[s][taken[s]])
        taken[s] += 1
    return found


@given(SOURCES, st.integers(1, 100), st.integers(0, 3), st.randoms(use_true_random=False))
def test_a_share_is_a_deal_of_shuffled_sources_whatever_the_order_of_samples(sources, percent, seed, chance):
    ids = [f"{source}-{place}" for place, source in enumerate(sources)]
    found = draw_share(ids, np.array(sources), share=percent / 100, seed=seed)
    assert found.tolist() == sorted({*found.tolist()})
    assert len(found) == max(1, -(-percent * len(ids) // 100))
    chosen = {ids[place] for place in found}
    assert chosen == {*deal_slowly(ids, sources, len(found), seed)}
    shuffled = chance.sample(range(len(ids)), len(ids))
    other = [ids[place] for place in shuffled]
    again = draw_share(other, np.array([9 - sources[place] for place in shuffled]), share=percent / 100, seed=seed)
    assert {other[place] for place in again} == chosen
    more = draw_share(ids, np.array(sources), share=(1 + percent / 100) / 2, seed=seed)
    assert {*found.tolist()} <= {*more.tolist()}  # a smaller share is a part of a larger one


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 50))
def test_each_source_gives_its_share(twentieths, twentieth, seed):
    sizes = [20 * size for size in twentieths]
    sources = np.repeat(np.arange(len(sizes)), sizes)
    found = draw_share([str(i) for i in range(len(sources))], sources, share=twentieth / 20, seed=seed)
    assert np.bincount(sources[found], minlength=len(sizes)).tolist() == [size * twentieth // 20 for size in sizes]


def test_sources_of_few_samples_round_up_and_down_in_equal_numbers():
    sources = np.array([0] * 900 + list(range(1, 101)))
    found = draw_share([str(i) for i in range(1000)], sources, share=0.5, seed=1)
    assert abs(int((sources[found] == 0).sum()) - 450) <= 1


def test_every_sample_is_as_likely_and_a_sorted_file_gives_of_its_end():
    sources = np.repeat([0, 1, 2], [1, 7, 52])
    ids = [f"sample {i}" for i in range(60)]
    counts = np.zeros(60)
    for seed in range(600):
        counts[draw_share(ids, sources, share=0.2, seed=seed)] += 1
    share = counts / 600
    assert share.mean() == pytest.approx(0.2)
    assert np.abs(share - 0.2).max() < 4.5 * np.sqrt(0.2 * 0.8 / 600)


def test_a_share_that_is_whole_is_not_rounded_up():
    for percent in range(1, 101):
        assert (
            len(draw_share([str(i) for i in range(100)], np.zeros(100, dtype=int), share=percent / 100, seed=0))
            == percent
        )
    assert Fraction(0.07) * 100 > 7  # why that is not said by ceil alone


def named(dataset):
    """Ids by source, as sets."""
    found = {}
    for sample_id, source in zip(dataset.sample_ids, dataset.sources().tolist(), strict=True):
        found.setdefault(source, set()).add(sample_id)
    return sorted(map(sorted, found.values()))


def test_readers_know_their_sources(tmp_path):
    def entry(name, **more):
        return {"id": name, "question": "what ?", "answer": "it", **more}

    (tmp_path / "mix.json").write_text(
        json.dumps(
            [
                entry("1", image="coco/train2017/1.jpg"),
                entry("2", image="gqa/2.jpg"),
                entry("3"),
                entry("4", image="coco/train2017/4.jpg"),
                entry("5", image="gqa/5.jpg", source="geo"),
                entry("6", source="geo"),
            ]
        )
    )
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(entry(name)) + "\n" for name in "ab"))
    assert named(open_dataset(str(tmp_path / "mix.json"))) == [["1", "4"], ["2"], ["3"], ["5", "6"]]
    assert named(open_dataset(str(tmp_path / "mix.json"), limit=3)) == [["1"], ["2"], ["3"]]
    (tmp_path / "all.yaml").write_text("- mix.json\n- two.jsonl\n")
    assert named(open_dataset(str(tmp_path / "all.yaml"))) == [["1", "4"], ["2"], ["3"], ["5", "6"], ["a", "b"]]
    for number in range(2):
        rows = {"id": [f"{number}{i}" for i in range(3)], "question": ["q"] * 3, "answer": ["a"] * 3}
        pq.write_table(pa.table({**rows, "dataset": ["x", "y", "x"]}), tmp_path / f"{number}.parquet", row_group_size=2)
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for key in rows["id"]:
                text = json.dumps(entry(key)).encode()
                info = tarfile.TarInfo(f"{key}.json")
                info.size = len(text)
                tar.addfile(info, BytesIO(text))
    found = named(open_dataset(str(tmp_path / "*.parquet")))
    assert found == [["00", "02"], ["01"], ["10", "12"], ["11"]]
    assert named(open_dataset(str(tmp_path / "*.tar"))) == [["00", "01", "02"], ["10", "11", "12"]]
    assert named(open_dataset("shapes:images=4,seed=0", limit=3)) == [
        [*open_dataset("shapes:images=4,seed=0").sample_ids[:3]]
    ]

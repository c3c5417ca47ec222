"""Counts of pictures, unknown words and failures: kept right by all that makes caches, checked, and said to people."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_factory import make_plan, make_record, sample_id, tree
from click.testing import CliRunner

from vlm_distill_cache.common.cache.counts import FailureCounts, SampleCounts, kept_reason
from vlm_distill_cache.common.cache.documents import document_bytes, read_document
from vlm_distill_cache.common.cache.manifest import read_manifest, seal
from vlm_distill_cache.common.cache.plan import read_plan, write_plan
from vlm_distill_cache.common.cache.sidecar import UnknownWords, read_sidecar, sidecar_path
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.errors import CacheFormatError, DataError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.convert import convert
from vlm_distill_cache.common.tools.merge import merge
from vlm_distill_cache.common.tools.select import Selection, pull_partial
from vlm_distill_cache.common.tools.verify import verify

TOKEN = 3
FIXTURES = Path(__file__).parents[1] / "fixtures"


def record_of(position: int) -> dict[str, np.ndarray]:
    """Every third sample has no picture; token 3 is a target of every fourth sample's first two rows."""
    record = make_record(5 if position == 1 else position + 10)
    if position % 3 == 0:
        empty = make_record(2)  # has no visual tokens
        record |= {name: empty[name] for name in ("tiles", "visual_columns", "visual_map")}
        record["image_hash"] = np.zeros((1, 16), np.uint8)
    if position % 4 == 0:
        record["labels"][:2] = TOKEN
        counts = record["entry_count"].astype(int)
        starts = np.cumsum(counts) - counts
        for start, count in zip(starts[:2], counts[:2], strict=False):  # the target is among the kept tokens
            record["token_ids"][start : start + count] = (TOKEN + np.arange(count)) % 100
    return record


def build(folder: Path, positions, *, store="zarr", shard_size=4, failed=(), unknown=True, **changes):
    positions = list(positions)
    plan = make_plan(store, samples=len(positions), shard_size=shard_size, **changes)
    write_plan(folder, plan)
    for shard in range(plan.shard_count):
        writer = open_writer(store, folder, shard, plan.all_fields)
        writer.unknown = UnknownWords(rows=0, token=TOKEN) if unknown else None
        mine = [positions[place] for place in plan.shard_range(shard)]
        for position in mine:
            if position not in failed:
                writer.append(sample_id(position), record_of(position))
        finish_shard(writer, [(sample_id(p), f"image '{p}.png' is torn") for p in mine if p in failed])
    seal(folder)
    return folder


def counted(folder: Path) -> dict[str, int]:
    """The slow, obvious counts, from the records."""
    cache = open_cache(folder)
    records = [cache.read(name) for name in cache]
    return {
        "pictures": sum(any(record["image_hash"].ravel()) for record in records),
        "unknown_rows": sum(label == TOKEN for record in records for label in record["labels"].tolist()),
    }


def told(folder: Path) -> dict[str, int]:
    totals = read_manifest(folder).totals
    return {name: totals[name] for name in ("pictures", "unknown_rows") if name in totals}


@pytest.fixture(params=["zarr", "webdataset"])
def store(request):
    return request.param


@pytest.mark.slow(quick=("webdataset",))
def test_all_that_makes_caches_keeps_the_counts(tmp_path, store):
    first = build(tmp_path / "first", range(10), store=store, failed={5})
    assert told(first) == counted(first)
    assert told(first)["pictures"] not in (0, 9)
    assert told(first)["unknown_rows"] > 0
    second = build(tmp_path / "second", range(8, 20), store=store)
    other = {"zarr": "webdataset", "webdataset": "zarr"}[store]
    convert(first, tmp_path / "converted", other)
    merge([first, second], tmp_path / "merged")
    pull_partial(first, tmp_path / "count", Selection(count=4))
    pull_partial(first, tmp_path / "shard", Selection(shards=(1, 2), signals=("logits",)))
    pull_partial(first, tmp_path / "ids", Selection(sample_ids=(sample_id(0), sample_id(9)), top_k=2))
    for name in ("converted", "merged", "count", "shard", "ids"):
        assert told(tmp_path / name) == counted(tmp_path / name), name
        assert verify(tmp_path / name, deep=True) == []
    convert(tmp_path / "converted", tmp_path / "back", store)
    assert tree(tmp_path / "back") == tree(first)


@pytest.mark.parametrize(("name", "value"), [("pictures", 1), ("pictures", 4), ("unknown", {"rows": 0, "token": TOKEN}),
                                             ("unknown", {"rows": 1, "token": 4})])  # fmt: skip
def test_deep_verification_compares_the_counts_with_the_records(tmp_path, name, value):
    cache = build(tmp_path / "cache", range(4), store="webdataset")
    body = read_document(sidecar_path(cache, 0))
    assert body[name] != value
    sidecar_path(cache, 0).write_bytes(document_bytes(body | {name: value}))
    seal(cache)
    assert verify(cache) == []
    [damage] = verify(cache, deep=True)
    assert "its sidecar says" in damage.reason


@pytest.mark.parametrize("wrong", [{"pictures": 5}, {"pictures": -1}, {"pictures": True}, {"pictures": None},
                                   {"unknown": {"rows": 10**6, "token": 3}}, {"unknown": {"rows": 1}},
                                   {"unknown": {"rows": 1, "token": "x"}}, {"unknown": 3}, {"more": 1}], ids=str)  # fmt: skip
def test_impossible_counts_are_refused(tmp_path, wrong):
    cache = build(tmp_path / "cache", range(4), store="webdataset")
    body = read_document(sidecar_path(cache, 0))
    sidecar_path(cache, 0).write_bytes(document_bytes(body | wrong))
    with pytest.raises(CacheFormatError):
        read_sidecar(cache, 0)


def test_caches_of_older_versions_stay_usable_and_say_that_nothing_was_counted(tmp_path, store):
    old = FIXTURES / f"cache-v1-{store}"
    assert told(old) == {}
    assert verify(old, deep=True) == []
    shown = CliRunner().invoke(main, ["inspect", str(old)]).output
    assert "with a picture: not recorded" in shown
    other = {"zarr": "webdataset", "webdataset": "zarr"}[store]
    convert(old, tmp_path / "converted", other)
    convert(tmp_path / "converted", tmp_path / "back", store)
    convert(tmp_path / "back", tmp_path / "again", other)
    assert told(tmp_path / "converted") == told(tmp_path / "back") == {}
    assert tree(tmp_path / "again") == tree(tmp_path / "converted")
    pull_partial(old, tmp_path / "part", Selection(count=2))
    assert told(tmp_path / "part") == {"pictures": 2}  # its records were seen; what the tokenizer lacks is not known
    assert verify(tmp_path / "part", deep=True) == []


def test_of_shards_some_of_which_do_not_say_there_is_no_sum(tmp_path):
    cache = build(tmp_path / "cache", range(8), store="webdataset")
    body = read_document(sidecar_path(cache, 1))
    del body["pictures"], body["unknown"]
    sidecar_path(cache, 1).write_bytes(document_bytes(body))
    seal(cache)
    assert told(cache) == {}
    assert verify(cache, deep=True) == []
    without = build(tmp_path / "without", range(8, 16), store="webdataset", unknown=False)
    assert told(without).keys() == {"pictures"}
    merge([without, build(tmp_path / "with", range(16, 20), store="webdataset")], tmp_path / "merged")
    assert told(tmp_path / "merged").keys() == {"pictures"}


def test_the_unknown_word_of_a_tokenizer_that_also_ends_answers_with_it_is_not_counted_by_records(tmp_path):
    cache = build(tmp_path / "cache", range(4), store="webdataset")
    body = read_document(sidecar_path(cache, 0))
    sidecar_path(cache, 0).write_bytes(document_bytes(body | {"unknown": {"rows": 2, "token": None}}))
    seal(cache)
    assert told(cache)["unknown_rows"] == 2
    assert verify(cache, deep=True) == []
    convert(cache, tmp_path / "converted", "zarr")
    assert told(tmp_path / "converted")["unknown_rows"] == 2
    pull_partial(cache, tmp_path / "part", Selection(count=2))
    assert "unknown_rows" not in told(tmp_path / "part")


def test_inspect_and_a_derived_card_say_the_counts_and_why_samples_failed(tmp_path):
    cache = build(tmp_path / "cache", range(12), failed={5, 6, 7})
    expected = counted(cache)
    shown = CliRunner().invoke(main, ["inspect", str(cache)]).output
    assert f"{expected['pictures']} of 9 samples with a picture" in shown
    assert f"{expected['unknown_rows']} of {read_manifest(cache).totals['rows']} targets" in shown
    assert "3 x, e.g. set/é.5: image '5.png' is torn" in shown
    pull_partial(cache, tmp_path / "part", Selection(shards=(1, 2)))
    card = (tmp_path / "part" / "README.md").read_text()
    assert f"{counted(tmp_path / 'part')['pictures']} of 5 samples with a picture" in card
    assert "| 3 | `image '5.png' is torn` | `set/é.5` |" in card


def test_the_next_step_of_a_cache_without_pictures_asks_for_no_attention(tmp_path):
    cache = build(tmp_path / "cache", [0, 3, 6])
    shown = CliRunner().invoke(main, ["inspect", str(cache)]).output
    assert "0 of 3 samples with a picture" in shown
    assert "dpt.losses.answer_attention=0 dft.losses.answer_attention=0" in shown


REASONS = [
    *((f"s{i}", f"sample 's{i}': image 'dir/{i}.png' cannot be read: No such file") for i in range(7)),
    *((f"s{i}", f"image {i}.jpg cannot be read: No such file") for i in range(10, 15)),
    *((f"s{i}", f"{i} tokens exceed max_length=512") for i in range(20, 23)),
    *((f"name{i}", f"name{i} is no picture") for i in range(2)),
    ("x", "a message must hold 'from'"),
]


def test_reasons_that_differ_in_names_paths_and_numbers_are_one_the_commonest_first():
    counts = FailureCounts(REASONS)
    assert counts.total == len(REASONS) == sum(count for count, _, _ in counts.rows())
    assert [count for count, _, _ in counts.rows()] == [12, 3, 2, 1]
    assert counts.lines()[0] == "12 x, e.g. s0: image 'dir/0.png' cannot be read: No such file"
    assert counts.lines()[-1] == "x: a message must hold 'from'"
    assert FailureCounts(REASONS).lines(limit=2)[2:] == ["... and 2 more reasons (3 samples)"]


def test_counting_is_a_counter_of_reasons_and_never_shows_more_than_ten():
    words = [f"reason of kind {'abcdefghijklmnop'[i % 16]}" for i in range(50)]
    counts = FailureCounts((f"id-{i}-", word) for i, word in enumerate(words))
    assert sorted(count for count, _, _ in counts.rows(limit=99)) == sorted(Counter(words).values())
    assert len(counts.lines()) == 11
    assert counts.lines()[-1].startswith("... and 6 more reasons")


def test_foreign_sidecars_with_hostile_reasons_are_shown_short_and_harmless(tmp_path):
    cache = build(tmp_path / "cache", range(4), store="webdataset", failed={1})
    body = read_document(sidecar_path(cache, 0))
    for failed in body["failed"]:
        failed["reason"] = "\x1b[2J\n" + "A" * 70_000 + "\u202e; set images to another folder"
    sidecar_path(cache, 0).write_bytes(document_bytes(body))
    seal(cache)
    for arguments in (["inspect", str(cache)], ["inspect", str(cache), sample_id(1)]):
        shown = CliRunner().invoke(main, arguments).output
        assert "set images to another folder" in shown
        assert len(shown) < 6000
        assert not {c for c in shown if not c.isprintable()} - {"\n"}


def test_a_kept_reason_is_kept_as_it_is_if_it_is_short():
    assert kept_reason("image 'a.png' is torn") == "image 'a.png' is torn"


def test_long_ids_are_shortened_and_no_command_is_proposed_that_would_not_work(tmp_path):
    plan = make_plan("webdataset", samples=1)
    write_plan(tmp_path, plan)
    writer = open_writer("webdataset", tmp_path, 0, plan.all_fields)
    writer.append("i" * 4096, record_of(1))
    finish_shard(writer)
    seal(tmp_path)
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path)]).output
    assert f"cachectl inspect {tmp_path} SAMPLE_ID" in shown
    assert "i" * 400 not in shown
    assert "i" * 400 not in CliRunner().invoke(main, ["inspect", str(tmp_path), "i" * 4096]).output
    assert "i" * 400 not in CliRunner().invoke(main, ["inspect", str(tmp_path), "i" * 4095]).output


def test_a_cache_of_nothing_but_failures_is_not_sealed_whoever_seals_it(tmp_path, store):
    with pytest.raises(
        DataError, match=r"none of its 6 samples could be used(.|\n)*6 x, e\.g\. set/é\.0: image '0\.png'"
    ):
        build(tmp_path / "cache", range(6), store=store, failed=set(range(6)))
    before = tree(tmp_path / "cache")
    with pytest.raises(DataError, match="none of its 6 samples could be used"):
        seal(tmp_path / "cache")
    assert tree(tmp_path / "cache") == before
    assert "6 x, e.g." in CliRunner().invoke(main, ["inspect", str(tmp_path / "cache")]).output


def test_merging_and_pulling_nothing_but_failures_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    whole = build(tmp_path / "whole", range(8), failed=set(range(4)))
    with pytest.raises(DataError, match="none of its 4 samples could be used"):
        pull_partial(whole, tmp_path / "part", Selection(shards=(0,)))
    assert not (tmp_path / "part").exists()
    monkeypatch.setattr("vlm_distill_cache.common.cache.manifest.refuse_nothing_usable", lambda *_: None)
    old = [build(tmp_path / str(n), range(4 * n, 4 * n + 4), failed=set(range(99))) for n in range(2)]
    monkeypatch.undo()
    with pytest.raises(DataError, match="none of its 8 samples could be used"):
        merge(old, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() or not tree(tmp_path / "merged")
    # Parts of one plan, not finished: what is there is copied, and nothing is sealed.
    plan = read_plan(old[0])
    for part in ("a", "b"):
        shutil.copytree(old[0], tmp_path / part)
        (tmp_path / part / "manifest.json").unlink()
    assert read_plan(tmp_path / "a") == plan
    with pytest.raises(DataError, match="none of its 4 samples could be used"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    assert not (tmp_path / "joined" / "manifest.json").exists()


def test_sums_are_those_of_the_sidecars(tmp_path):
    cache = build(tmp_path / "cache", range(10), failed={5})
    counts = SampleCounts()
    for shard in range(3):
        counts.add(read_sidecar(cache, shard))
    totals = read_manifest(cache).totals
    assert (counts.samples, counts.rows, counts.failures.total) == (9, totals["rows"], 1)
    assert {"pictures": counts.pictures, "unknown_rows": counts.unknown} == told(cache)
    counts.add(replace(read_sidecar(cache, 0), pictures=None, unknown=None))
    assert (counts.pictures, counts.unknown) == (None, None)
    assert json.loads((cache / "manifest.json").read_text())["totals"]["pictures"] == told(cache)["pictures"]

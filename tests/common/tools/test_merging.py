"""Merging: nothing lost, nothing twice, nothing that contradicts itself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_factory import (
    FAILED,
    assert_equal_records,
    build_cache,
    build_shard,
    make_plan,
    make_record,
    sample_id,
    tree,
)
from click.testing import CliRunner

from vlm_distill_cache.common.cache.manifest import read_manifest, seal
from vlm_distill_cache.common.cache.plan import Plan, read_plan, write_plan
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, DistillError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.merge import merge
from vlm_distill_cache.common.tools.select import Selection, pull_partial
from vlm_distill_cache.common.tools.sinks import write_sinks
from vlm_distill_cache.common.tools.verify import verify


def build_of(
    root: Path, positions, *, store: str = "zarr", failed=(), shard_size: int = 4, change=None, **plan
) -> Path:
    """A sealed cache of chosen samples of the factory."""
    positions = list(positions)
    made = make_plan(store, samples=len(positions), shard_size=shard_size, **plan)
    write_plan(root, made)
    for index in range(made.shard_count):
        writer = open_writer(store, root, index, made.all_fields)
        lost = []
        for position in (positions[i] for i in made.shard_range(index)):
            if position in failed:
                lost.append((sample_id(position), "image is truncated"))
                continue
            record = make_record(position)
            if change is not None:
                change(position, record)
            writer.append(sample_id(position), record)
        finish_shard(writer, lost)
    (root / "processor").mkdir()
    (root / "processor" / "note.json").write_text("{}\n")
    (root / "README.md").write_text(f"---\nlicense: cc-by-4.0\n---\n# {root.name}\n")
    seal(root)
    return root


def data(name: str) -> dict[str, object]:
    return {
        "data": {"name": name, "split": "train", "license": f"{name}-licence", "cache_license": "cc-by-4.0"},
        "fingerprints": {"teacher": "a" * 32, "data": name * 32, "codec": "c" * 32},
    }


def assert_holds(path: Path, positions) -> None:
    cache = open_cache(path)
    assert list(cache.sample_ids) == [sample_id(i) for i in positions]
    for i in positions:
        expected = make_record(i)
        found = cache.read(sample_id(i), expected.keys())
        assert_equal_records(found, expected)
    assert verify(path, deep=True) == []


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_two_data_sets_become_one_cache_that_names_both(tmp_path: Path, store: str):
    first = build_of(tmp_path / "a", range(6), **data("x"))
    second = build_of(tmp_path / "b", range(6, 11), store="webdataset", **data("y"))
    merged = merge([first, second], tmp_path / "m", store=store)
    assert_holds(tmp_path / "m", range(11))
    plan = read_plan(tmp_path / "m")
    assert plan.store == store
    assert merged.samples == 11
    assert merged.repeated == 0
    assert [part["fingerprint"] for part in plan.data["parts"]] == ["x" * 32, "y" * 32]
    assert plan.extra["derived"]["sources"] == [open_cache(c).manifest_hash for c in (first, second)]
    assert plan.fingerprints["teacher"] == "a" * 32
    assert plan.data["name"] == "x + y"
    assert plan.data["license"] == "x-licence + y-licence"
    assert plan.data["cache_license"] == "cc-by-4.0"
    card = (tmp_path / "m" / "README.md").read_text()
    assert card.count("> license: cc-by-4.0") == 2
    assert "| the data | x-licence + y-licence |" in card


def test_what_both_hold_is_kept_once_and_in_order(tmp_path: Path):
    first = build_of(tmp_path / "a", [4, 0, 2], **data("x"))
    second = build_of(tmp_path / "b", [2, 1, 4, 6], **data("x"))
    merged = merge([first, second], tmp_path / "m")
    assert_holds(tmp_path / "m", [4, 0, 2, 1, 6])
    assert merged.repeated == 2
    assert "parts" not in read_plan(tmp_path / "m").data  # one data set, not two


def test_a_sample_that_failed_once_and_is_there_elsewhere_is_taken(tmp_path: Path):
    first = build_of(tmp_path / "a", range(4), failed={1, 2})
    second = build_of(tmp_path / "b", range(2, 6), failed={3, 5})
    merge([first, second], tmp_path / "m")
    cache = open_cache(tmp_path / "m")
    assert set(cache.sample_ids) == {sample_id(i) for i in (0, 2, 3, 4)}
    assert set(cache.failed) == {sample_id(1), sample_id(5)}


@pytest.mark.parametrize("field", ["image_hash", "labels", "log_gap", "visual_map"])
def test_a_sample_with_two_contents_is_refused_before_anything_is_written(tmp_path: Path, field: str):
    def change(position: int, record) -> None:
        if position == 5:
            record[field] = record[field].copy()
            record[field].reshape(-1)[-1] ^= np.array(1, record[field].dtype)

    first = build_of(tmp_path / "a", range(6))
    second = build_of(tmp_path / "b", range(4, 9), change=change)
    with pytest.raises(CacheMismatchError, match=r"'set/é.5': .*b holds .* than .*a;") as caught:
        merge([first, second], tmp_path / "m")
    assert ("picture" if field == "image_hash" else field) in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_caches_that_mean_different_things_are_refused_with_both_values(tmp_path: Path):
    first = build_of(tmp_path / "a", range(3))
    other = {"fingerprints": {"teacher": "z" * 32, "data": "b" * 32}, "template": {"name": "short"}}
    second = build_of(tmp_path / "b", range(3, 6), **other)
    with pytest.raises(CacheMismatchError) as caught:
        merge([first, second], tmp_path / "m")
    for part in ("fingerprints.teacher", "a" * 32, "z" * 32, "template", "short"):
        assert part in str(caught.value)


def test_parts_with_other_signals_are_refused_in_plain_words(tmp_path: Path):
    whole = build_of(tmp_path / "whole", range(6))
    parts = [tmp_path / "a", tmp_path / "b"]
    pull_partial(str(whole), parts[0], Selection(signals=("logits",), count=3))
    pull_partial(str(whole), parts[1], Selection(count=2))
    with pytest.raises(CacheMismatchError) as caught:
        merge(parts, tmp_path / "m")
    said = str(caught.value)
    held = ", ".join(sorted(read_plan(whole).signals))
    assert f"signals: {parts[0]} holds logits; {parts[1]} holds {held}\n" in said
    assert "pull it again with the other's --signals and --top-k" in said
    assert not set("{}[]") & set(said)
    assert len(said.splitlines()) == 3


def test_fields_that_differ_are_said_in_plain_words(tmp_path: Path):
    fields = dict(read_plan(build_of(tmp_path / "a", range(2))).fields)
    fields["logits"] = tuple(replace(f, dtype="u4") if f.name == "entry_count" else f for f in fields["logits"])
    second = build_of(tmp_path / "b", range(2, 3), fields=fields, change=widen_entry_counts)
    with pytest.raises(CacheMismatchError) as caught:
        merge([tmp_path / "a", second], tmp_path / "m")
    assert "fields.logits.entry_count" in str(caught.value)
    assert "dtype u1" in str(caught.value)
    assert not set("{}") & set(str(caught.value))


def widen_entry_counts(_: int, record) -> None:
    record["entry_count"] = record["entry_count"].astype(np.uint32)


def test_another_processor_is_refused_by_name(tmp_path: Path):
    first = build_of(tmp_path / "a", range(3))
    second = build_of(tmp_path / "b", range(3, 6))
    (second / "processor" / "note.json").write_text("{ }\n")
    seal(second, rewritten=True)
    with pytest.raises(CacheMismatchError, match=r"processor/note\.json"):
        merge([first, second], tmp_path / "m")


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.slow(quick=("webdataset",))
def test_killed_after_any_shard_it_goes_on_to_the_same_bytes(tmp_path: Path, store: str):
    sources = [build_of(tmp_path / "a", range(6), store=store), build_of(tmp_path / "b", range(5, 12))]
    merge(sources, tmp_path / "whole")
    expected = tree(tmp_path / "whole")

    class KilledError(Exception):
        pass

    for stop in range(3):
        calls = iter(range(9))

        def kill(stop: int = stop, calls=calls) -> None:
            if next(calls) == stop:
                raise KilledError

        target = tmp_path / f"killed-{stop}"
        with pytest.raises(KilledError):
            merge(sources, target, on_shard=kill)
        assert not (target / "manifest.json").exists()
        merge(sources, target)
        assert tree(target) == expected
    merge(sources, tmp_path / "whole")  # once more changes nothing
    assert tree(tmp_path / "whole") == expected


def part_of(root: Path, plan: Plan, shards) -> Path:
    """A cache as one of several machines leaves it: unsealed, some of its shards."""
    write_plan(root, plan)
    for index in shards:
        build_shard(root, plan, index)
    (root / "processor").mkdir()
    (root / "processor" / "note.json").write_text("{}\n")
    return root


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_parts_of_one_plan_become_the_cache_one_machine_would_have_built(tmp_path: Path, store: str):
    plan = make_plan(store)
    build_cache(tmp_path / "whole", plan)
    write_sinks(tmp_path / "whole")
    seal(tmp_path / "whole")
    parts = [part_of(tmp_path / "a", plan, [0, 1]), part_of(tmp_path / "b", plan, [1, 2])]
    merged = merge(parts, tmp_path / "m")
    assert merged.manifest is not None
    assert merged.missing == ()
    assert tree(tmp_path / "m") == tree(tmp_path / "whole")
    assert sample_id(FAILED) in open_cache(tmp_path / "m").failed


def test_parts_whose_teachers_lie_in_folders_of_other_names_are_parts_all_the_same(tmp_path: Path):
    plans = [make_plan(teacher={"name": name, "family": "llava", "vocabulary": 100}) for name in "ab"]
    parts = [part_of(tmp_path / "a", plans[0], [0, 1]), part_of(tmp_path / "b", plans[1], [2])]
    assert merge(parts, tmp_path / "m").manifest is not None
    assert read_plan(tmp_path / "m") == plans[0]
    assert verify(tmp_path / "m", deep=True) == []


def test_parts_built_with_unlike_options_are_told_which_and_how_to_build_one_again(tmp_path: Path):
    plans = [make_plan(extra={"threads": threads}) for threads in (1, 2)]
    parts = [part_of(tmp_path / "a", plans[0], [0, 1]), part_of(tmp_path / "b", plans[1], [2])]
    with pytest.raises(CacheMismatchError) as caught:
        merge(parts, tmp_path / "m")
    assert f"  extra.threads: {parts[0]} has 1, {parts[1]} has 2\n" in str(caught.value)
    assert "build that part again with the same options (--set threads=1)" in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_missing_parts_are_named_and_may_come_later(tmp_path: Path):
    plan = make_plan(samples=20)  # 5 shards
    parts = [part_of(tmp_path / "a", plan, [0]), part_of(tmp_path / "b", plan, [3])]
    result = CliRunner().invoke(main, ["merge", *map(str, parts), "--output", str(tmp_path / "m")])
    assert result.exit_code == 0, result.output
    assert "3 shards are missing: 1-2, 4" in result.output
    with pytest.raises(CacheFormatError, match="not sealed"):
        read_manifest(tmp_path / "m")
    sources = [str(tmp_path / "m"), str(part_of(tmp_path / "c", plan, [1, 2, 4]))]
    result = CliRunner().invoke(main, ["merge", *sources, "--output", str(tmp_path / "n")])
    assert result.exit_code == 0, result.output
    assert "Next: teacher-cache fidelity" in result.output  # parts have neither figures nor a card
    assert read_manifest(tmp_path / "n").totals["samples"] == 19
    assert verify(tmp_path / "n", deep=True) == []


def test_a_shard_built_twice_with_other_content_is_refused_by_sample(tmp_path: Path, monkeypatch):
    plan = make_plan()
    parts = [part_of(tmp_path / "a", plan, [0])]
    monkeypatch.setattr("cache_factory.make_record", lambda i: make_record(i if i != 2 else 7))
    parts.append(part_of(tmp_path / "b", plan, [0, 1]))
    with pytest.raises(CacheMismatchError, match=r"shard 0: .*'set/é.2' differs between"):
        merge(parts, tmp_path / "m")


def test_a_damaged_part_is_not_copied(tmp_path: Path):
    plan = make_plan("webdataset")
    parts = [part_of(tmp_path / "a", plan, [0]), part_of(tmp_path / "b", plan, [1, 2])]
    path = parts[1] / "shards" / "00002.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DistillError, match=r"00002\.tar"):
        merge(parts, tmp_path / "m")
    assert not (tmp_path / "m" / "shards" / "00002.json").exists()
    assert not (tmp_path / "m" / "manifest.json").exists()


def test_folders_that_cannot_be_merged_are_refused(tmp_path: Path):
    first = build_of(tmp_path / "a", range(3))
    second = shutil.copytree(first, tmp_path / "b")
    for sources, target in (
        ([first], "m"),
        ([first, first], "m"),
        ([first, second], "a/m"),
        ([first, second], "b"),
    ):
        with pytest.raises(ConfigError):
            merge(sources, tmp_path / target)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="not empty and no cache"):
        merge([first, second], tmp_path / "home")
    unsealed = part_of(tmp_path / "c", make_plan(samples=9), [0])
    with pytest.raises(CacheMismatchError, match=r"not finished, and no parts of one plan: .*c\n"):
        merge([first, unsealed], tmp_path / "m")


def test_the_command_says_what_it_merged(tmp_path: Path):
    first, second = build_of(tmp_path / "a", range(4)), build_of(tmp_path / "b", range(2, 6))
    output = str(tmp_path / "m")
    result = CliRunner().invoke(main, ["merge", str(first), str(second), "--output", output])
    assert result.exit_code == 0, result.output
    assert "Merged 6 samples" in result.output
    assert "2 of them in several sources" in result.output
    assert f"cachectl verify {output}" in result.output

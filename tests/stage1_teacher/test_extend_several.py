"""Samples with several pictures, and videos, that come to a sealed cache which had none: what one build of all would give."""

from pathlib import Path

import pytest
from several_data import write_data

from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.select import Selection, pull_partial
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extend import extend
from vlm_distill_cache.stage1_teacher.extract import extract

SIGNALS = ("logits", "answer_attention", "visual_columns")


def options_of(teacher: Path, data: str, **options) -> dict:
    return {"data": data, "teacher": str(teacher), "template": "short", "fidelity_samples": 0, "batch_size": 1,
            "signals": SIGNALS, "max_unknown_share": 1.0, "shard_size": 4, **options}  # fmt: skip


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("store", "there", "come"),
    [
        ("zarr", ("text", "one", "again"), ("two",)),
        ("webdataset", ("one", "text"), ("again", "clip", "both")),
        ("zarr", ("one", "two"), ("clip",)),
        ("webdataset", ("one", "clip"), ("again", "two", "both")),
    ],
)
def test_a_cache_topped_up_by_several_pictures_or_videos_is_byte_for_byte_one_build(
    tmp_path: Path, tiny_llava: Path, store: str, there: tuple[str, ...], come: tuple[str, ...]
):
    data = write_data(tmp_path / "data", *there)
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    extract(BuildConfig(cache=str(cache), **options_of(tiny_llava, data, store=store)))
    write_data(tmp_path / "data", *there, *come)
    given = {"data": data, "teacher": str(tiny_llava), "fidelity_samples": 0, "max_unknown_share": 1.0}
    found = extend(BuildConfig(cache=str(cache), **given), given=tuple(given))
    assert found.samples == len(come)
    extract(BuildConfig(cache=str(whole), **options_of(tiny_llava, data, store=store)))
    assert tree(cache) == tree(whole)
    assert verify(cache, deep=True) == []
    assert open_cache(cache).plan.format_version == 2
    assert ("frames" in read_plan(cache).extra) == bool({"clip", "both"} & {*there, *come})


def test_a_part_without_videos_stays_what_it_is_whatever_comes_to_the_data(tmp_path: Path, tiny_llava: Path):
    data = write_data(tmp_path / "data", "one", "text", "again")
    extract(BuildConfig(cache=str(tmp_path / "cache"), **options_of(tiny_llava, data)))
    pull_partial(str(tmp_path / "cache"), tmp_path / "part", Selection(signals=("logits", "answer_attention")))
    write_data(tmp_path / "data", "one", "text", "again", "clip")
    given = {"data": data, "teacher": str(tiny_llava), "fidelity_samples": 0, "signals": ("visual_columns",)}
    found = extend(BuildConfig(cache=str(tmp_path / "part"), **given, max_unknown_share=1.0), given=tuple(given))
    assert (found.samples, found.signals) == (0, ("visual_columns",))
    plan = open_cache(tmp_path / "part").plan
    assert plan.format_version == 1
    assert "frames" not in plan.extra

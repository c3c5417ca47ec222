"""Derived caches: killed anywhere and resumed, the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cache_factory import make_plan

from vlm_distill_cache.common.cache.side_files import refuse_occupied
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.tools.derive import Slot, derive_cache, derive_plan


def check_every_kill(store: str, folder: Path, stride: int) -> None:
    script = Path(__file__).parents[1] / "kill_derived.py"
    root = script.parents[2]
    result = subprocess.run(
        [sys.executable, script, store, folder, str(stride)],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{script.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert all(int(places) > 5 for places in result.stdout.split())


@pytest.mark.parametrize(("store", "stride"), [("zarr", 61), ("webdataset", 15)])
@pytest.mark.slow
def test_killed_anywhere_and_resumed_the_bytes_are_the_same(tmp_path: Path, store: str, stride: int):
    check_every_kill(store, tmp_path, stride)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_killed_at_every_place_and_resumed_the_bytes_are_the_same(tmp_path: Path, store: str):
    check_every_kill(store, tmp_path, 1)


def test_the_plan_keeps_the_meaning_and_says_what_it_is_a_part_of():
    source = make_plan(fingerprints={"teacher": "a" * 32, "data": "b" * 32, "codec": "c" * 32})
    how = {"kind": "part", "sources": ["d" * 32]}
    plan = derive_plan(source, sample_count=3, how=how, signals={"logits": source.signals["logits"]})
    assert plan.extra["derived"] == how
    assert plan.signals.keys() == plan.fields.keys() == {"logits"}
    same = ("teacher", "data")
    assert [plan.fingerprints[name] for name in same] == [source.fingerprints[name] for name in same]
    assert plan.fingerprints["codec"] != source.fingerprints["codec"]
    assert derive_plan(source, sample_count=3, how=how).fingerprints == source.fingerprints


def test_as_many_slots_as_samples_are_needed(tmp_path: Path):
    with pytest.raises(ValueError, match="1 slots for a plan of 10"):
        derive_cache(
            tmp_path / "x",
            make_plan(),
            [Slot(sample_id="a")],
            lambda _: {},
            sources=[],
        )
    assert not (tmp_path / "x").exists()


def test_a_file_and_a_folder_of_other_things_are_no_place_for_a_cache(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "home" / "shards").mkdir(parents=True)
    refuse_occupied(tmp_path / "home")  # what a run leaves that is killed before its plan
    refuse_occupied(tmp_path / "new")
    (tmp_path / "home" / "shards" / "picture.png").write_text("")
    for name in ("file", "home"):
        with pytest.raises(ConfigError, match="not empty and no cache"):
            refuse_occupied(tmp_path / name)

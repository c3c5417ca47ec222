"""Fixtures shared by the tests of stage two."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import lora_runs
import pytest
import sharded_runs
import tower_runs
import train_runs
from accelerate.state import AcceleratorState
from broken_runs import train_in_two_processes
from filelock import FileLock
from finished_runs import make_config
from tiny_cache import build_tiny_cache

from vlm_distill_cache.stage2_student.run import run
from vlm_distill_cache.stage2_student.train import train

# Tiny checkpoints of every family, which the tests of stage one make.
sys.path.append(str(Path(__file__).parents[1] / "stage1_teacher"))


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory):
    """A sealed cache of all signals with exact codecs, and the live teacher behind it."""
    path = tmp_path_factory.mktemp("cache") / "tiny"
    return path, build_tiny_cache(path)


@pytest.fixture(scope="session")
def in_two_processes(tiny_cache, tmp_path_factory):
    """The folders of the runs of `train_runs`, `lora_runs`, `tower_runs` and `sharded_runs`, and of `fused_models`.

    All in two processes, but those that are called ``-one``; ``sharded-on`` goes on where one process stopped.
    Whoever of the workers comes first trains them for all: starting torch twice takes longer than the runs.
    """
    home = tmp_path_factory.getbasetemp()
    folder = (home.parent if "PYTEST_XDIST_WORKER" in os.environ else home) / "two"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            made = {"plain": train_runs.make_config, "lora": lora_runs.make_config}
            scored = {"evaluation": train_runs.ON_THE_WAY}
            configs = [make(tiny_cache[0], folder / name, **scored) for name, make in made.items()]
            mixed, kept = tower_runs.mixed_cache(folder / "mixed"), str(folder / "pixels")
            configs.append(tower_runs.make_config(mixed, folder / "tower", pixel_cache=kept, memory_gib=0.0))
            one = {name: folder / f"{name}-one" for name in ("sharded", "tower")}
            train(sharded_runs.make_config(tiny_cache[0], one["sharded"]))
            train(tower_runs.make_config(mixed, one["tower"]))
            sharded_runs.stopped_behind(2, one["sharded"], folder / "sharded-on")
            sharded = [folder / name for name in ("sharded", "sharded-on")]
            configs += [sharded_runs.make_config(tiny_cache[0], output, sharding="fsdp2") for output in sharded]
            configs.append(replace(configs[2], output=str(folder / "sharded-tower"), sharding="fsdp2"))
            train_in_two_processes(folder, *configs)
            (folder / "done").touch()
    made = (
        "plain",
        "lora",
        "tower",
        "mixed",
        "pixels",
        "sharded",
        "sharded-on",
        "sharded-tower",
        "sharded-one",
        "tower-one",
    )
    return {name: folder / name for name in made} | {"fused": folder}


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps precision and device in a process-wide singleton; a shared fixture may just have set it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def finished(tiny_cache, tmp_path_factory):
    """A finished run; tests that change something use `copied`."""
    output = tmp_path_factory.mktemp("runs") / "run"
    return run(make_config(tiny_cache[0], output))


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a finished run."""
    shutil.copytree(finished.output, tmp_path / "run")
    return tmp_path / "run"

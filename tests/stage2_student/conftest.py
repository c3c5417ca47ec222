"""Fixtures shared by the tests of stage two."""

import shutil
import sys
from pathlib import Path

import lora_runs
import pytest
import train_runs
from accelerate.state import AcceleratorState
from broken_runs import train_in_two_processes
from finished_runs import make_config
from tiny_cache import build_tiny_cache

from vlm_distill_cache.stage2_student.run import run

# Tiny checkpoints of every family, which the tests of stage one make.
sys.path.append(str(Path(__file__).parents[1] / "stage1_teacher"))


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory):
    """A sealed cache of all signals with exact codecs, and the live teacher behind it."""
    path = tmp_path_factory.mktemp("cache") / "tiny"
    return path, build_tiny_cache(path)


@pytest.fixture(scope="session")
def in_two_processes(tiny_cache, tmp_path_factory):
    """The folders of the runs of `train_runs` and `lora_runs`, each trained in two processes."""
    folder = tmp_path_factory.mktemp("two")
    made = {"plain": train_runs.make_config, "lora": lora_runs.make_config}
    train_in_two_processes(folder, *(make(tiny_cache[0], folder / name) for name, make in made.items()))
    return {name: folder / name for name in made}


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

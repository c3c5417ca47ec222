"""Fixtures shared by the tests of stage two."""

import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from tiny_cache import build_tiny_cache

# Tiny checkpoints of every family, which the tests of stage one make.
sys.path.append(str(Path(__file__).parents[1] / "stage1_teacher"))


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory):
    """A sealed cache of all signals with exact codecs, and the live teacher behind it."""
    path = tmp_path_factory.mktemp("cache") / "tiny"
    return path, build_tiny_cache(path)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps precision and device in a process-wide singleton."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)

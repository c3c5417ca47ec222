"""A stranger's cache through every command, whatever its documents say: refused in words, or a sound result."""

import os
import shutil
from pathlib import Path
from time import monotonic

import pytest
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from hostile_documents import hostile_documents
from tiny_cache import build_tiny_cache
from train_runs import make_config

from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.errors import DistillError
from vlm_distill_cache.stage2_student.train import train

DATA = "shapes:images=4,seed=5"
COMMANDS = ("inspect", "verify", "convert", "merge", "select", "train", "train")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "cache"
    build_tiny_cache(path, data=DATA, signals=("logits", "answer_attention"), shard_size=3, store="webdataset")
    return path


def use(command: str, cache: Path, target: Path, sound: Path) -> str:
    """Run a command on a cache in this process; what it said, or nothing if it went through.

    A command that fails otherwise than with one of our own errors fails the test.
    """
    if command == "train":
        AcceleratorState._reset_state(reset_partial_state=True)
        phases = {
            "dpt": {"steps": 0},
            "dft": {"steps": 1, "batch_size": 2, "losses": {"logits": 1.0, "answer_attention": 1.0}},
        }
        try:
            train(make_config(cache, target, data=None, projector="taf", **phases, sft={"steps": 0}))
        except DistillError as error:
            return str(error)
        return ""
    arguments = {
        "inspect": ["inspect", str(cache)],
        "verify": ["verify", "--deep", str(cache)],
        "convert": ["convert", str(cache), str(target), "--store", "zarr"],
        "merge": ["merge", str(cache), str(sound), "--output", str(target)],
        "select": ["pull", str(cache), str(target), "--samples", "2", "--signals", "logits", "--top-k", "2"],
    }[command]
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1), result.output
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    return result.output if result.exit_code else ""


def try_all(sound: Path, folder: Path, *, seed: int, seconds: float, most: int | None = None) -> list[str]:
    """Try hostile changes for so long; which of them ended otherwise than they may."""
    failed, until = [], monotonic() + seconds
    cache = shutil.copytree(sound, folder / "cache")
    for number, change in enumerate(hostile_documents(sound, seed)):
        if monotonic() > until or number == most:
            break
        change.write(cache)
        command = COMMANDS[number % len(COMMANDS)]
        started = monotonic()
        try:
            use(command, cache, folder / "out", sound)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            failed.append(f"{command}: {change.name}: {type(error).__name__}: {error}"[:300])
        if (took := monotonic() - started) > 20:
            failed.append(f"{command}: {change.name}: {took:.0f} s")
        shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.rmtree(cache)
        shutil.copytree(sound, cache)
    return failed


def test_the_sound_cache_goes_through_every_command(sound: Path, tmp_path: Path):
    for command in dict.fromkeys(COMMANDS):
        assert use(command, sound, tmp_path / command, sound) == ""


def test_whatever_a_document_says_is_refused_in_words_or_harmless(sound: Path, tmp_path: Path):
    assert try_all(sound, tmp_path, seed=17, seconds=5, most=60) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("HOSTILE_SEEDS", "1"))))
def test_every_leaf_of_every_document(sound: Path, tmp_path: Path, seed: int):
    assert try_all(sound, tmp_path, seed=seed, seconds=1500) == []

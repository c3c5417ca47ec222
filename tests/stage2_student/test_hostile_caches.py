"""A stranger's cache through every command, whatever its documents say: refused in words, or a sound result."""

import json
import os
import shutil
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from cache_factory import make_plan
from click.testing import CliRunner
from hostile_documents import Change, hostile_documents
from tiny_cache import build_tiny_cache
from train_runs import make_config

from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.errors import DistillError
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.preparation import built_in_data, prepare

DATA = "shapes:images=4,seed=5"
COMMANDS = ("inspect", "verify", "convert", "merge", "select", "train", "train")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "cache"
    build_tiny_cache(path, data=DATA, signals=("logits", "answer_attention"), shard_size=3, store="webdataset")
    return path


def config_of(cache: Path, output: Path) -> TrainConfig:
    """One step of a student that takes all that a cache carries of its teacher."""
    step = {"steps": 1, "batch_size": 2, "losses": {"logits": 1.0, "answer_attention": 1.0}}
    return make_config(cache, output, data=None, projector="taf", dpt={"steps": 0}, dft=step, sft={"steps": 0})


def use(command: str, cache: Path, target: Path, sound: Path) -> str:
    """Run a command on a cache in this process; what it said, or nothing if it went through.

    A command that fails otherwise than with one of our own errors fails the test.
    """
    if command == "train":
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            train(config_of(cache, target))
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
    cache = shutil.copytree(sound, tmp_path / "cache")
    for command in dict.fromkeys(COMMANDS):
        assert use(command, cache, tmp_path / command, sound) == "", command


def test_whatever_a_document_says_is_refused_in_words_or_harmless(sound: Path, tmp_path: Path):
    assert try_all(sound, tmp_path, seed=17, seconds=4, most=60) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("HOSTILE_SEEDS", "1"))))
def test_every_leaf_of_every_document(sound: Path, tmp_path: Path, seed: int):
    assert try_all(sound, tmp_path, seed=seed, seconds=1500) == []


class _Named:
    """What is asked of a cache that names its data."""

    def __init__(self, name: str, samples: int, **described: Any) -> None:
        self.plan = make_plan(data={"name": name, **described})
        self._samples = samples

    def __len__(self) -> int:
        return self._samples


@pytest.mark.parametrize(
    ("cache", "spec"),
    [
        (_Named("shapes:images=1500,seed=0[:64]", 64, limit=64), "shapes:images=1500,seed=0"),
        (_Named("shapes:images=90000,seed=3", 90_000), "shapes:images=90000,seed=3"),
        (_Named("shapes:images=9,seed=0,kinds=scene+motion[:4]", 4), "shapes:images=9,seed=0,kinds=scene+motion"),
        (_Named("easy-vqa/train", 10), "easy-vqa"),
        (_Named("shapes:images=2000000000,seed=0", 10), None),
        (_Named("shapes:images=900000,seed=0", 10), None),
        (_Named("shapes:images=15000", 10, parts=[{"limit": at} for at in range(14_000, 14_009)]), None),
        (_Named("shapes:images=10,seed=" + "9" * 5000, 10), None),
        (_Named("../../etc", 10), None),
        (_Named("org/name", 10), None),
        (_Named("shapes:split=test", 10), None),
    ],
)  # fmt: skip
def test_a_cache_names_built_in_data_of_about_its_size_and_nothing_else(cache: Any, spec: str | None):
    assert built_in_data(cache) == spec


@pytest.mark.parametrize(
    ("document", "changes", "message"),
    [
        ("vision_tower.json", {"num_hidden_layers": 512}, r"vision_tower\.safetensors: tensors \['encoder\.layers"),
        ("vision_tower.json", {"intermediate_size": 1 << 18}, r"vision_tower\.safetensors: tensors"),
        ("vision_tower.json", {"hidden_size": 10**7}, r"vision_tower\.json: hidden_size is 10000000; expected a whole"),
        ("vision_tower.json", {"hidden_act": "no such"}, "hidden_act of its vision tower is 'no such'"),
        ("vision_tower.json", {"layer_norm_eps": 0}, "its vision tower cannot be made"),
        ("projector.json", {"hidden": 1 << 18}, r"projector\.safetensors: tensors \['linear_1"),
        ("projector.json", {"act": ["gelu"]}, r"projector\.json: act is \['gelu'\]; expected text"),
    ],
)
def test_sizes_are_compared_with_the_tensors_that_are_there(sound: Path, tmp_path: Path, document, changes, message):
    cache = shutil.copytree(sound, tmp_path / "cache")
    stored = json.loads((cache / document).read_bytes())
    Change("", document, json.dumps(stored | changes).encode()).write(cache)
    with pytest.raises(DistillError, match=message):
        prepare(config_of(cache, tmp_path / "out"))

"""A training that is extended is, byte for byte, the one that was so long from its beginning; all else is refused in words."""

import json
import re
import shutil
from pathlib import Path

import pytest
from finished_runs import make_config

from vlm_distill_cache.common.cache.manifest import read_manifest
from vlm_distill_cache.common.cache.versions import BEFORE, version_folder
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.tools.outlook import Outlook
from vlm_distill_cache.stage2_student.final_folder import read_final
from vlm_distill_cache.stage2_student.run import look_at_training, run, train_alone
from vlm_distill_cache.stage2_student.training.extension import _set, versions_kept
from vlm_distill_cache.stage2_student.training.resolve import open_caches

SHORT, LONG = "sft.steps=2", "sft.steps=4"
STEADY = ("phases=[dpt, sft]", "sft.schedule=constant", "sft.warmup=0", "checkpoint_every=1")


def made(folder):
    """The digests of the student's files, and what was learnt at each step."""
    trained = read_final(folder / "final")["files"]
    times = ("step_s", "samples_per_s", "data_wait")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return trained, [{name: value for name, value in line.items() if name not in times} for line in lines]


@pytest.mark.slow
def test_an_extended_training_is_the_longer_one_even_if_it_was_killed_on_the_way(tiny_cache, tmp_path):
    def configure(name, *more):
        return make_config(tiny_cache[0], tmp_path / name, *STEADY, *more)

    train_alone(configure("at-once", LONG))
    short = train_alone(configure("extended", SHORT))
    before = read_final(short.final)

    def stop(position, student):
        if position.total_steps == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_alone(configure("extended", LONG), extends=True, after_step=stop)
    assert read_final(short.final) == before  # the student that is there stays whole
    with pytest.raises(ConfigError, match=r"sft\.steps: there has 2, this run has 4; to train .* add --extend"):
        train_alone(configure("extended", LONG))
    extended = train_alone(configure("extended", LONG), extends=True)
    assert len(extended.log) == 5
    assert made(tmp_path / "extended") == made(tmp_path / "at-once")
    assert read_final(short.final)["fingerprint"] == read_final(tmp_path / "at-once" / "final")["fingerprint"]


@pytest.mark.parametrize(
    ("first", "more", "reason"),
    [
        (["sft.steps=3", "sft.schedule=cosine", "sft.warmup=0"], [], "schedule cosine"),
        ([], [], r"add --set sft\.warmup=0\.125"),
        ([], ["sft.warmup=0.125", "sft.steps=1"], r"has 2 steps, and 1 are asked for"),
        ([], ["sft.warmup=0.125", "sft.epochs=0.01", "sft.steps=null"], r"has 2 steps, and 0 are asked for"),
        ([], ["dpt.steps=2"], r"(?s)differs in more than the length of phase sft.*dpt\.steps"),
    ],
)
@pytest.mark.slow
def test_what_would_not_be_the_longer_training_is_refused_and_changes_nothing(
    tiny_cache, tmp_path, first, more, reason
):
    def configure(*more):
        rising = ("phases=[dpt, sft]", "sft.schedule=constant", "sft.warmup=0.5", "checkpoint_every=1")
        return make_config(tiny_cache[0], tmp_path / "one", *rising, SHORT, *first, *more)

    train_alone(configure())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=reason):
        train_alone(configure(LONG, *more), extends=True)
    with pytest.raises(ConfigError) as plain:  # what cannot work is not proposed
        train_alone(configure(LONG, *more))
    assert ("add --extend" in str(plain.value)) == (not first and not more)
    outlook, config = Outlook(), configure(LONG, *more)
    look_at_training(outlook, config, open_caches(config), extends=True)
    assert len(outlook.problems) == 1
    assert re.search(reason, outlook.problems[0])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    if not first and not more:
        shutil.rmtree(
            tmp_path / "one" / "checkpoints" / "step-00000003"
        )  # what the student has learnt counts, not this
        with pytest.raises(ConfigError, match=reason):
            train_alone(configure(LONG), extends=True)
        train_alone(configure(LONG, "sft.warmup=0.125"), extends=True)  # as the error proposes


@pytest.mark.slow
def test_a_finished_run_offers_to_extend_both_students(tiny_cache, tmp_path):
    steady = [f"{phase}.{option}" for phase in ("dpt", "dft", "sft") for option in ("schedule=constant", "warmup=0")]
    output = tmp_path / "steady"
    run(make_config(tiny_cache[0], output, "phases=[sft]", *steady))
    longer = make_config(tiny_cache[0], output, "phases=[sft]", *steady, "sft.steps=2")
    with pytest.raises(ConfigError, match=r"(?s)sft\.steps: the folder has 1, this run has 2.*add --extend"):
        run(longer)
    assert run(longer, extends=True).fresh
    assert not run(longer, extends=True).fresh
    assert len((output / "distilled" / "log.jsonl").read_text().splitlines()) == 2


def test_who_trained_on_a_cache_that_was_extended_since_is_told_where_that_one_is(tmp_path):
    frozen = Path(__file__).parents[2] / "common/fixtures/cache-v1-zarr"
    manifest, cache = read_manifest(frozen), tmp_path / "a cache"
    kept, other = version_folder(cache, BEFORE, manifest), version_folder(tmp_path / "b", BEFORE, manifest)
    shutil.copytree(frozen, kept)
    shutil.copytree(frozen, tmp_path / f"{cache.name}.before-0123456789ab")  # is not what its name says
    other.mkdir()
    was, now = manifest.hash, {str(cache): "1" * 32, str(tmp_path / "b"): "2" * 32, "s3://bucket/c": "3" * 32}
    for before in ({"cache": was}, {"cache": None, "sft": {"cache": was}}, {"dpt": {"caches": [was, "4" * 32]}}):
        said = versions_kept(before, now)
        assert f"{cache} was extended: --cache '{kept}' goes on with what that run learned from" in said
        assert said.count("--cache") == 1
    assert f"--cache '{kept}' is what it was before" in versions_kept(None, now)
    assert versions_kept({"cache": "4" * 32, "dft": {"cache": None}, "lr": "x"}, now) == ""
    assert versions_kept({"cache": was}, {str(cache): was}) == ""


def test_options_that_nobody_set_are_no_difference():
    assert _set({"merge_frames": None, "seed": 0, "limit": None}, {"limit": 3}) == {"seed": 0, "limit": None}

"""Presets of phases: every published number is pinned, and each student gets the preset made for it."""

import json

import pytest
import yaml

from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.terminal.next_step import DEFAULT_SIGNALS
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.losses.terms import choose_terms
from vlm_distill_cache.stage2_student.pruned_folder import RECORD, Kept, kept_share
from vlm_distill_cache.stage2_student.training.resolve import PRESETS, phases_preset, resolve_config

GIVEN = ["cache=c", "output=o"]


def load(name):
    values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    return config_from_dict(TrainConfig, values | {"cache": "c", "output": "o"})


def test_the_published_preset_is_the_published_recipe_number_by_number():
    config = load("phases-published")
    assert config.phases == ("dpt", "dft", "sft")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (128, 256.0, 0.0)
    assert config.dtype == "bfloat16"
    phases = [config.phase(name) for name in config.phases]
    assert [phase.batch_size for phase in phases] == [256, 128, 192]
    assert [phase.epochs for phase in phases] == [1.0, 1.0, 1.0]
    assert [phase.trainable for phase in phases] == ["projector", "lora", "lora"]
    for phase in phases:
        assert (phase.lr, phase.schedule, phase.warmup, phase.weight_decay) == (2e-4, "cosine", 0.03, 0.0)
        assert phase.freeze == ()
    assert phases[0].losses.active() == {"lm": 1.0, "logits": 1.0}
    assert phases[1].losses.active() == {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0}
    assert phases[2].losses.active() == {"lm": 1.0}
    assert (phases[0].losses.temperature, config.data_share) == (1.0, 1.0)


@pytest.mark.parametrize("name", ["phases-published", "phases-tiny"])
def test_the_proposed_next_command_knows_the_losses_of_the_presets(name: str):
    config = load(name)
    terms = {phase: choose_terms(config.phase(phase).losses.distilled) for phase in config.phases}
    read = {phase: {signal for term in terms[phase].values() for signal in term.reads} for phase in terms}
    assert read["dpt"] | read["dft"] == set(DEFAULT_SIGNALS)
    assert read["sft"] == set()


def test_the_tiny_preset_tunes_everything():
    config = load("phases-tiny")
    assert [config.phase(name).trainable for name in config.phases] == ["projector", "all", "all"]


def test_the_pruned_preset_is_the_published_recovery():
    config = load("phases-pruned")
    assert config.phases == ("dft",)
    assert config.data_share == 0.05
    assert (config.lora.rank, config.lora.alpha, config.dtype) == (16, 32.0, "bfloat16")
    phase = config.phase("dft")
    assert (phase.lr, phase.weight_decay, phase.warmup, phase.schedule) == (4e-5, 0.05, 0.03, "cosine")
    assert (phase.batch_size, phase.epochs, phase.trainable) == (128, 1.0, "lora")
    assert phase.losses.active() == {"lm": 1.0, "hidden": 1.0}
    assert load("phases-pruned-tiny").phase("dft").losses == phase.losses


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("phases-*.yaml")))
def test_every_preset_says_where_its_numbers_come_from_and_loads(preset):
    first = (PRESETS / f"{preset}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert load(preset).phases


@pytest.mark.parametrize(
    ("student", "width", "preset"),
    [
        ("mobilevlm", 96, "phases-tiny"),
        ("mobilevlm", 4096, "phases-published"),
        ("mobilevlm-tiny", 4096, "phases-tiny"),
        ("mobilevlm-1.7b", 96, "phases-published"),
        ("pruned:0.5", 96, "phases-pruned-tiny"),
        ("pruned:0.5", 4096, "phases-pruned"),
    ],
)
def test_a_student_is_trained_by_its_own_preset(student, width, preset):
    assert phases_preset(student, width) == preset


@pytest.mark.parametrize("nested", [True, False], ids=["text_config", "flat"])
def test_a_folder_is_trained_by_its_width_and_by_whether_it_was_cut_out(tmp_path, nested):
    size = {"hidden_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": size} if nested else size))
    assert phases_preset(str(tmp_path), 96) == "phases-published"
    (tmp_path / RECORD).write_text("{}")
    assert phases_preset(str(tmp_path), 96) == "phases-pruned"


def test_options_override_a_preset():
    config = resolve_config(
        None,
        [*GIVEN, "student=mobilevlm", "dft.trainable=all", "dft.freeze=[embeddings]"],
        teacher_width=4096,
    )
    assert (config.dft.trainable, config.dft.freeze, config.sft.trainable) == ("all", ("embeddings",), "lora")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["student=pruned:0.5"], r"teacher is None.*--teacher"),
        (["student=pruned:half", "teacher=t"], r"'pruned:half'; expected pruned:KEEP"),
        (["student=pruned:1.5", "teacher=t"], r"above 0 and at most 1"),
        (["data_share=0"], r"data_share is 0.*above 0 and at most 1"),
        (["lora.rank=0"], r"lora.rank is 0.*1 or more"),
        (["lora.dropout=1"], r"lora.dropout is 1"),
        (["dft.trainable=adapters"], r"dft.trainable"),
        (["dft.freeze=[vision]"], r"dft.freeze"),
    ],
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(None, [*GIVEN, *options], teacher_width=96)


def test_other_students_are_no_share():
    assert kept_share("mobilevlm") is None
    assert kept_share("pruned:0.25") == kept_share("pruned:width:0.25") == Kept(width=0.25)
    assert kept_share("pruned:depth:0.75") == Kept(depth=0.75)
    assert kept_share("pruned:depth:0.75,width:0.5") == Kept(width=0.5, depth=0.75)

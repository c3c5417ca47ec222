"""Whatever would divide a model is refused, whoever asks and however, but FSDP2 of a student; what asks for nothing is not."""

import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from click.testing import CliRunner

from vlm_distill_cache.common.errors import LaunchError
from vlm_distill_cache.common.terminal import command_line, sharding
from vlm_distill_cache.common.terminal.launch import enter_launch, ignored_options
from vlm_distill_cache.common.terminal.sharding import find_sharding, refuse_sharding

# As `accelerate launch` sets them, by its flags.
ASKED = {
    "ACCELERATE_USE_FSDP=true": "FSDP",
    "ACCELERATE_USE_FSDP=1": "FSDP",
    "ACCELERATE_USE_DEEPSPEED=True": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM=true": "Megatron-LM",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE=2": "FSDP",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE=-1": "FSDP",
    "PARALLELISM_CONFIG_TP_SIZE=2": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE=2": "context parallelism",
    "PARALLELISM_CONFIG_SP_SIZE=4": "sequence parallelism",
    "ACCELERATE_MIXED_PRECISION=fp8": "fp8",
}
HARMLESS = {
    "ACCELERATE_USE_FSDP": "off", "ACCELERATE_USE_DEEPSPEED": "n", "ACCELERATE_USE_MEGATRON_LM": "F",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "1", "PARALLELISM_CONFIG_CP_BACKEND": "torch",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "8", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "FSDP_OFFLOAD_PARAMS": "true",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_accelerator(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "accelerate.state", SimpleNamespace(AcceleratorState=SimpleNamespace(_shared_state={}))
    )
    enter_launch.cache_clear()
    level = logging.getLogger().level  # all processes but the first log errors alone
    with mock.patch.dict(os.environ):
        yield
    logging.getLogger().setLevel(level)
    enter_launch.cache_clear()


@pytest.mark.parametrize("asked", ASKED)
def test_variables_that_ask_for_it_are_found_among_those_that_do_not(asked: str):
    name, _, value = asked.partition("=")
    assert find_sharding(HARMLESS) == {}
    assert find_sharding(HARMLESS | {name: value}) == {asked: ASKED[asked]}


# As `accelerate launch --use_fsdp --fsdp_version 2` sets them.
SECOND = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true", "FSDP_FORWARD_PREFETCH": "false",
}  # fmt: skip


@pytest.mark.parametrize("version", [None, "1", "2"])
def test_the_second_version_of_fsdp_divides_a_student_in_training_and_nothing_else(version: str | None, monkeypatch):
    asked = {name: value for name, value in SECOND.items() if name != "FSDP_VERSION"}
    asked |= {} if version is None else {"FSDP_VERSION": version}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    kind = "FSDP2" if version == "2" else "FSDP"
    for model, divides in (("student", False), ("teacher", False), ("student", version != "2")):
        with pytest.raises(LaunchError, match=rf"not supported: {kind} \(ACCELERATE_USE_FSDP=true\)\."):
            refuse_sharding({}, model=model, divides=divides)
    if version == "2":
        assert refuse_sharding({}, model="student", divides=True)
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(LaunchError, match=r"not supported: DeepSpeed .*`unset ACCELERATE_USE_DEEPSPEED`"):
            refuse_sharding({}, model="student", divides=True)


def test_a_student_is_not_divided_where_nobody_asks():
    assert not refuse_sharding({}, model="student", divides=True)


def test_parameters_of_fsdp_in_main_memory_are_refused(monkeypatch):
    for name, value in (SECOND | {"FSDP_OFFLOAD_PARAMS": "True"}).items():
        monkeypatch.setenv(name, value)
    said = r"not supported: parameters in main memory \(FSDP_OFFLOAD_PARAMS=True\)\. .*`unset FSDP_OFFLOAD_PARAMS`"
    with pytest.raises(LaunchError, match=said):
        refuse_sharding({}, model="student", divides=True)


def test_of_the_options_beside_fsdp2_those_are_named_that_are_not_done_here():
    """Of accelerate's defaults only that each process reads the whole student."""
    assert ignored_options(SECOND) == ["FSDP_CPU_RAM_EFFICIENT_LOADING=true"]
    own = SECOND | {
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "FSDP_OFFLOAD_PARAMS": "1",
    }
    assert ignored_options(own) == [
        "FSDP_ACTIVATION_CHECKPOINTING=true (here: gradient_checkpointing)",
        "FSDP_CPU_RAM_EFFICIENT_LOADING=true",
        "FSDP_RESHARD_AFTER_FORWARD=false",
    ]


@pytest.mark.parametrize("command", [("distill", "train"), ("distill", "run"), ("teacher-cache", "build")])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_command_that_runs_a_model_refuses_and_one_process_says_it(command, rank: int, tmp_path, monkeypatch):
    from vlm_distill_cache.stage1_teacher import cli as one
    from vlm_distill_cache.stage2_student import cli as two

    waited: list[float] = []
    monkeypatch.setattr(command_line.time, "sleep", waited.append)
    for asked in ("ACCELERATE_USE_FSDP=true", "PARALLELISM_CONFIG_TP_SIZE=2"):
        monkeypatch.setenv(*asked.split("=", 1))
    for name, value in (("ID", "0"), ("NUM_TASKS", "2")):
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    monkeypatch.setenv("SLURM_PROCID", str(rank))
    monkeypatch.setenv("SLURM_LOCALID", str(rank))
    program, verb = command
    made = str(tmp_path / "made")
    options = ["--cache", str(Path(__file__).parent), "--output", made] if program == "distill" else ["--cache", made]
    ran = CliRunner().invoke((two if program == "distill" else one).main, [verb, "--data", "shapes", *options])
    assert ran.exit_code == 1
    assert not any(tmp_path.iterdir())
    if rank:
        assert (ran.output, waited) == ("", [command_line.SAY_S])
    else:
        assert (
            "not supported: FSDP (ACCELERATE_USE_FSDP=true), tensor parallelism (PARALLELISM_CONFIG_TP_SIZE=2)"
            in ran.output
        )
        assert "`unset ACCELERATE_USE_FSDP PARALLELISM_CONFIG_TP_SIZE`" in ran.output
        assert "--nproc N" in ran.output
        assert not waited


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"distributed_type": SimpleNamespace(name="FSDP")}, "FSDP (distributed_type=FSDP)"),
        ({"parallelism_config": SimpleNamespace(tp_size=2, cp_size=1)}, "tensor parallelism (parallelism_config.tp_size=2)"),
        ({"_mixed_precision": "fp8"}, "fp8 (mixed_precision=fp8). An Accelerator of this Python process"),
        ({"dynamo_plugin": SimpleNamespace(backend=SimpleNamespace(name="INDUCTOR"))}, "torch.compile (dynamo_plugin"),
    ],
)  # fmt: skip
def test_an_accelerator_of_the_same_process_that_shards_is_refused(state, said: str, monkeypatch):
    monkeypatch.setattr(sys.modules["accelerate.state"].AcceleratorState, "_shared_state", state)
    with pytest.raises(LaunchError, match=re.escape(said)):
        refuse_sharding({}, model="student")
    refuse_sharding({}, model="teacher")  # stage one has no accelerator


def test_a_variable_set_after_the_launch_was_joined_is_seen(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    enter_launch()
    assert enter_launch().sharding == {"ACCELERATE_USE_DEEPSPEED=true": "DeepSpeed"}  # and taken out
    refuse_sharding({}, model="student")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(LaunchError, match=r"DeepSpeed .*`unset ACCELERATE_USE_DEEPSPEED`"):
        sharding.refuse_sharding({}, model="student")

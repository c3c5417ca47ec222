"""The loop: phases train what they say, and a killed run ends as if it had never been killed."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from accelerate.state import AcceleratorState
from broken_runs import Copies
from train_runs import LOSSES, losses, make_config

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.data.text.processors import load_image_processor, load_tokenizer
from vlm_distill_cache.stage2_student.config import TrainConfig, without_teacher
from vlm_distill_cache.stage2_student.final_folder import read_final
from vlm_distill_cache.stage2_student.students.build import load_student
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.checkpoint import CHECKPOINTS
from vlm_distill_cache.stage2_student.training.log import read_log


class KilledError(Exception):
    pass


def kill_after(total_steps):
    def after_step(position, _student):
        if position.total_steps == total_steps:
            raise KilledError

    return after_step


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return Copies(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def uninterrupted(tiny_cache, copies):
    return train(make_config(tiny_cache[0], copies.output), after_step=copies)


@pytest.mark.parametrize(
    "killed_after",
    [1, 2, 5, 6],
    ids=["before any checkpoint", "between phases", "inside the second phase", "past an epoch's end"],
)
@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    tiny_cache, tmp_path, uninterrupted, copies, killed_after
):
    copies.killed_after(killed_after, tmp_path / "run")
    resumed = train(make_config(tiny_cache[0], tmp_path / "run"))
    assert losses(resumed.log) == losses(uninterrupted.log)
    assert losses(read_log(tmp_path / "run")) == losses(uninterrupted.log)
    counted = [read_final(result.final)["vocabulary"] for result in (resumed, uninterrupted)]
    assert counted[0] == counted[1]
    assert counted[0]["entries_read"] > 0
    expected = uninterrupted.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_run_killed_while_writing_a_checkpoint_resumes_from_the_one_before(tiny_cache, tmp_path, uninterrupted):
    config = make_config(tiny_cache[0], tmp_path / "run")
    with pytest.raises(KilledError):
        train(config, after_step=kill_after(6))
    newest = sorted((tmp_path / "run" / CHECKPOINTS).iterdir())[-1]
    (newest / "tensors.pt").write_bytes(b"half")
    assert losses(train(config).log) == losses(uninterrupted.log)


def test_the_log_has_one_object_a_step_with_every_term(uninterrupted):
    lines = (uninterrupted.final.parent / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, 10))
    assert [record["phase"] for record in records] == ["dpt"] * 2 + ["dft"] * 6 + ["sft"]
    for record in records:
        assert {"lr", "samples_per_s", "data_wait", "step_s", "total", "lm"} <= record.keys()
        assert 0 <= record["data_wait"] <= 1
    assert {"logits", "answer_attention", "visual_map", "sink_pairs", "sink_mass"} <= records[3].keys()
    assert "logits" not in records[8]
    assert list((uninterrupted.final.parent / "tensorboard").iterdir())


def test_the_final_folder_loads_with_its_tokenizer_and_says_where_it_comes_from(uninterrupted, tiny_cache):
    student = load_student(uninterrupted.final)
    expected = uninterrupted.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())
    load_tokenizer(uninterrupted.final)
    load_image_processor(uninterrupted.final)
    told = json.loads((uninterrupted.final / "distillation.json").read_text())
    assert told["caches"] == {str(tiny_cache[0]): uninterrupted.preparation.cache_hashes[str(tiny_cache[0])]}


def test_each_phase_trains_its_parts_and_the_vision_tower_never_changes(tiny_cache, tmp_path):
    seen = []

    def keep(_position, student):
        seen.append({name: value.clone() for name, value in student.state_dict().items()})

    config = make_config(tiny_cache[0], tmp_path / "run", phases=["dpt", "dft"])
    config = replace(config, dpt=replace(config.dpt, steps=2), dft=replace(config.dft, steps=1))
    train(config, after_step=keep)
    changed = [{n for n, v in after.items() if not torch.equal(v, before[n])} for before, after in pairwise(seen)]
    assert changed[0]
    assert all(".mm_projector." in name for name in changed[0])
    assert any(".layers." in name for name in changed[1])
    assert not any(".vision_tower." in name for name in changed[1])


def test_accumulated_micro_batches_give_the_losses_of_the_whole_batch(tiny_cache, tmp_path, uninterrupted):
    config = make_config(tiny_cache[0], tmp_path / "run")
    config = replace(config, dft=replace(config.dft, micro_batch_size=2), dpt=replace(config.dpt, micro_batch_size=3))
    for found, expected in zip(losses(train(config).log), losses(uninterrupted.log), strict=True):
        for name in set(found) & set(LOSSES):
            assert found[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-5), (found["step"], name)


def test_threads_change_nothing_but_the_time(tiny_cache, tmp_path, uninterrupted):
    config = make_config(tiny_cache[0], tmp_path / "run", num_workers=0, memory_gib=0.0)
    assert losses(train(config).log) == losses(uninterrupted.log)


def test_the_teacher_adapter_trains_its_post_projector_only(tiny_cache, tmp_path):
    phase = {"steps": 1, "batch_size": 4, "trainable": "projector", "losses": {"logits": 1.0}}
    result = train(make_config(tiny_cache[0], tmp_path, projector="taf", phases=["dpt"], dpt=phase))
    trained = {name for name, p in result.model.named_parameters() if p.requires_grad}
    assert trained == {"model.mm_projector.post.weight", "model.mm_projector.post.bias"}


def test_bf16_runs_and_starts_from_the_same_loss(tiny_cache, tmp_path):
    config = make_config(tiny_cache[0], tmp_path / "run", phases=["dft"], dtype="bfloat16")
    config = replace(config, dft=replace(config.dft, steps=2))
    full = make_config(tiny_cache[0], tmp_path / "full", phases=["dft"])
    full = replace(full, dft=replace(full.dft, steps=2))
    half = train(config).log[0]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert half["total"] == pytest.approx(train(full).log[0]["total"], rel=0.02)


def test_every_phase_computes_in_bfloat16_and_a_killed_run_ends_like_an_uninterrupted_one(
    tiny_cache, tmp_path, monkeypatch
):
    seen, project, phases = {}, torch.nn.Linear.forward, []

    def forward(layer, inputs):
        found = project(layer, inputs)
        if torch.is_grad_enabled():
            seen.setdefault(phases[-1] if phases else "dpt", set()).add(found.dtype)
        return found

    def one_step(name, **changes):
        short = make_config(tiny_cache[0], tmp_path / name, dtype="bfloat16", checkpoint_every=1)
        return replace(
            short, **{phase: replace(short.phase(phase), steps=1) for phase in ("dpt", "dft", "sft")}, **changes
        )

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", forward)
        whole = train(
            one_step("whole"), after_step=lambda position, _: phases.append(("dft", "sft", "end")[len(phases)])
        )
    assert {phase: torch.bfloat16 in dtypes for phase, dtypes in seen.items()} == dict.fromkeys(
        ("dpt", "dft", "sft"), True
    )
    with pytest.raises(KilledError):
        train(one_step("killed"), after_step=kill_after(2))
    resumed = train(one_step("killed"))
    assert losses(resumed.log) == losses(whole.log)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_another_precision_in_one_process_is_refused_in_words(tiny_cache, tmp_path):
    config = make_config(tiny_cache[0], tmp_path / "run", phases=["dft"])
    train(replace(config, dft=replace(config.dft, steps=1)))
    with pytest.raises(ConfigError, match=r"dtype=bfloat16: .* train in a process of its own"):
        train(make_config(tiny_cache[0], tmp_path / "half", phases=["dft"], dtype="bfloat16"))


def test_the_baseline_is_the_same_run_without_the_teachers_losses(tiny_cache, tmp_path):
    config = make_config(tiny_cache[0], tmp_path / "run")
    baseline = without_teacher(config)
    for name in ("dpt", "dft", "sft"):
        assert getattr(baseline, name).losses.active() == {"lm": 1.0}
        assert getattr(baseline, name).steps == getattr(config, name).steps
        assert getattr(baseline, name).trainable == getattr(config, name).trainable


def test_another_configuration_does_not_resume_from_this_ones_checkpoints(tiny_cache, uninterrupted):
    config = make_config(tiny_cache[0], uninterrupted.final.parent, seed=1)
    with pytest.raises(ConfigError, match=r"belongs to another run.*Use another --output"):
        train(config)


def test_two_processes_see_the_same_steps_as_one(in_two_processes, uninterrupted):
    found_losses = losses(read_log(in_two_processes["plain"]))
    for found, expected in zip(found_losses, losses(uninterrupted.log), strict=True):
        for name in set(found) & set(LOSSES):
            assert found[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-5), (found["step"], name)


def test_a_loss_that_is_not_finite_stops_before_its_step_and_names_the_remedy(tiny_cache, tmp_path):
    seen = {}

    def poison(position, student):
        if position.total_steps == 3:
            student.lm_head.weight.data[5] = torch.nan
            seen.update({name: value.clone() for name, value in student.state_dict().items()})
            seen["student"] = student

    with pytest.raises(ModelError, match=r"phase dft, step 2: loss .*Lower dft\.lr, .*verify --deep"):
        train(make_config(tiny_cache[0], tmp_path / "run"), after_step=poison)
    after = seen.pop("student").state_dict()
    assert all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in seen.items())
    assert len(read_log(tmp_path / "run")) <= 3


@pytest.mark.parametrize(
    ("options", "projector"),
    [
        ({}, None), ({"projector": "mlp"}, "mlp"), ({"projector": "taf"}, "mlp"),
        ({"projector": "taf", "pool_teacher_tokens": True}, "ldpnetv2"), ({"student": "compodistill-tiny"}, "mlp"),
    ],
)  # fmt: skip
def test_the_baseline_has_as_many_visual_tokens_as_the_student_and_no_teachers_projector(tmp_path, options, projector):
    baseline = without_teacher(TrainConfig(cache="c", output=str(tmp_path), **options))
    assert baseline.projector == projector
    assert not baseline.pool_teacher_tokens

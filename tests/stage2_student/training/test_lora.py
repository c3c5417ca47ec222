"""Adapters: in the decoder only, equal to their formula, gone after training, exact over kills and processes."""

import builtins

import pytest
import torch
from broken_runs import Copies
from lora_runs import equal_weights, losses, make_config, save_teacher
from tiny_students import library_student, mobilevlm_student
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.stage2_student.students.build import load_student
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.checkpoint import list_checkpoints, read_checkpoint
from vlm_distill_cache.stage2_student.training.log import read_log
from vlm_distill_cache.stage2_student.training.parts import (
    TrainedParts,
    adapter_parameters,
    add_adapters,
    load_adapters,
    merge_adapters,
)

STUDENTS = {"mobilevlm": mobilevlm_student, "llava": library_student}


def fill(student, *, seed=3):
    """Give every adapter values, so that it does something."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in adapter_parameters(student).values():
            parameter.normal_(std=0.1)


def run_logits(student, inputs):
    with torch.no_grad():
        return student.eval()(**inputs).logits


@pytest.mark.parametrize("kind", STUDENTS)
def test_new_adapters_change_no_bit_of_the_output_and_sit_in_the_decoder_alone(kind):
    student, inputs = STUDENTS[kind]()
    before = run_logits(student, inputs)
    plain = {name: value.requires_grad for name, value in student.named_parameters()}
    added = add_adapters(student, rank=2, alpha=4, dropout=0.0, seed=0)
    assert torch.equal(run_logits(student, inputs), before)
    names = list(adapter_parameters(student))
    linears = [m for m in student.language_model.layers.modules() if type(m) is nn.Linear and m.bias is None]
    assert len(added) == len(names) == 2 * 7 * student.language_model.config.num_hidden_layers
    assert linears
    assert all(".layers." in name for name in names)
    assert not any(word in name for name in names for word in ("vision", "projector", "lm_head", "embed"))
    assert all(value.requires_grad for value in added)
    kept = {n.replace(".base_layer", ""): v.requires_grad for n, v in student.named_parameters()}
    assert {name: kept[name] for name in plain} == plain


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_adapted_students_say_the_same_and_merging_leaves_no_trace(kind, dtype):
    student, inputs = STUDENTS[kind]()
    student.to(dtype)
    if "pixel_values" in inputs:
        inputs = inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}
    names = list(student.state_dict())
    plain = run_logits(student, inputs)
    add_adapters(student, rank=2, alpha=4, dropout=0.0, seed=0)
    fill(student)
    adapted = run_logits(student, inputs)
    merge_adapters(student)
    assert list(student.state_dict()) == names
    assert not adapter_parameters(student)
    assert not any("peft" in type(module).__module__ for module in student.modules())
    difference = (run_logits(student, inputs) - adapted).abs().max()
    effect = (plain - adapted).abs().max()
    assert difference < (1e-5 if dtype == torch.float32 else 0.15) * effect
    add_adapters(student, rank=2, alpha=4, dropout=0.0, seed=0)  # and again, as the next phase does
    assert adapter_parameters(student)


def test_an_adapted_layer_is_its_formula_in_value_and_gradient():
    torch.manual_seed(0)
    student = nn.Module()
    student.language_model = nn.Module()
    student.language_model.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(6, 5)})])
    weight = student.language_model.layers[0]["proj"].weight.detach().clone()
    bias = student.language_model.layers[0]["proj"].bias.detach().clone()
    add_adapters(student, rank=2, alpha=6, dropout=0.0, seed=0)
    fill(student)
    a, b = (value.detach().clone().requires_grad_() for value in adapter_parameters(student).values())
    x = torch.randn(7, 6)
    found = student.language_model.layers[0]["proj"](x)
    expected = F.linear(x, weight + 6 / 2 * b @ a, bias)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for own, reference in zip(adapter_parameters(student).values(), (a, b), strict=True):
        torch.testing.assert_close(own.grad, reference.grad)


def test_attention_is_captured_through_adapters_and_carries_their_gradient():
    student, inputs = mobilevlm_student()
    add_adapters(student, rank=2, alpha=4, dropout=0.0, seed=0)
    fill(student)
    capture = AttentionCapture(student.language_model)
    rows, keys = torch.tensor([[9, 10]]), torch.tensor([[1, 2, 3]])
    with capture.record({"a": AttentionRequest(rows, keys, ((0, 1),))}) as maps:
        student(**inputs)
    merged, _ = mobilevlm_student()
    add_adapters(merged, rank=2, alpha=4, dropout=0.0, seed=0)
    fill(merged)
    merge_adapters(merged)
    merged.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = merged(**inputs, output_attentions=True).attentions
    expected = torch.stack(eager[:2]).mean((0, 2))[:, rows[0]][:, :, keys[0]]
    torch.testing.assert_close(maps["a"][:, 0].detach(), expected, atol=1e-6, rtol=1e-5)
    maps["a"].square().sum().backward()
    reached = [name for name, value in adapter_parameters(student).items() if value.grad is not None]
    assert any("layers.1.self_attn.q_proj.lora_B" in name for name in reached)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return Copies(tmp_path_factory.mktemp("lora") / "whole")


@pytest.fixture(scope="module")
def uninterrupted(tiny_cache, copies):
    seen = {}

    def keep_logits(position, student):
        copies(position, student)
        if position.total_steps == 5:
            seen["logits"] = run_logits(student, seen["inputs"])
            student.train()

    seen["inputs"] = {"input_ids": torch.tensor([[30, 31, 32, 33, 30]])}
    result = train(make_config(tiny_cache[0], copies.output), after_step=keep_logits)
    return result, seen


def test_the_saved_student_is_a_plain_one_that_says_what_the_adapted_one_said(uninterrupted):
    result, seen = uninterrupted
    student = load_student(result.final)
    assert not any("lora" in name for name in student.state_dict())
    torch.testing.assert_close(run_logits(student, seen["inputs"]), seen["logits"], atol=1e-5, rtol=1e-4)
    assert equal_weights(student, result.model)


@pytest.mark.parametrize("killed_after", [1, 2, 3, 4, 5])
@pytest.mark.slow(quick=("4",))
def test_a_killed_run_with_adapters_ends_bit_for_bit_like_an_uninterrupted_one(
    tiny_cache, tmp_path, uninterrupted, copies, killed_after
):
    copies.killed_after(killed_after, tmp_path / "run")
    resumed = train(make_config(tiny_cache[0], tmp_path / "run"))
    assert losses(resumed.log) == losses(uninterrupted[0].log)
    assert losses(read_log(tmp_path / "run")) == losses(uninterrupted[0].log)
    assert equal_weights(resumed.model, uninterrupted[0].model)


def test_checkpoints_hold_adapters_and_projector_and_nothing_of_the_rest(uninterrupted):
    result, _ = uninterrupted
    newest = read_checkpoint(list_checkpoints(result.final.parent)[-1])["student"]
    assert all(".lora_" in name or ".mm_projector." in name for name in newest["values"])
    assert len(newest["merged"]) == 1  # those of dft, which end in the weights that sft begins with
    stored = sum(value.numel() for values in (newest["values"], *newest["merged"]) for value in values.values())
    decoder = sum(value.numel() for value in result.model.language_model.layers.parameters())
    assert stored < decoder / 2


@pytest.mark.parametrize("order", [("lora", "all"), ("all", "lora"), ("lora", "projector")])
@pytest.mark.slow(quick=("order0",))
def test_adapters_beside_other_phases_resume_exactly(tiny_cache, tmp_path, order):
    changes = {
        name: {"steps": 2, "batch_size": 4, "trainable": kind} for name, kind in zip(("dft", "sft"), order, strict=True)
    }
    options = {"phases": ["dft", "sft"], **changes}
    copies = Copies(tmp_path / "whole")
    whole = train(make_config(tiny_cache[0], copies.output, **options), after_step=copies)
    copies.killed_after(3, tmp_path / "killed")
    resumed = train(make_config(tiny_cache[0], tmp_path / "killed", **options))
    assert losses(resumed.log) == losses(whole.log)
    assert equal_weights(resumed.model, whole.model)


def test_a_library_student_with_adapters_resumes_exactly_and_is_saved_plain(tiny_cache, tmp_path):
    options = {
        "student": str(save_teacher(tmp_path / "student", seed=1)),
        "phases": ["dft", "sft"],
        "dft": {
            "steps": 1, "batch_size": 4, "trainable": "lora", "losses": {"logits": 1.0, "answer_attention": 1.0},
        },
        "sft": {"steps": 2, "batch_size": 4, "trainable": "lora", "freeze": ["projector"]},
    }  # fmt: skip
    copies = Copies(tmp_path / "whole")
    whole = train(make_config(tiny_cache[0], copies.output, **options), after_step=copies)
    copies.killed_after(3, tmp_path / "killed")
    resumed = train(make_config(tiny_cache[0], tmp_path / "killed", **options))
    assert losses(resumed.log) == losses(whole.log)
    assert equal_weights(resumed.model, whole.model)
    saved = open_family_model(resumed.final).model.state_dict()
    assert saved.keys() == open_family_model(tmp_path / "student").model.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in resumed.model.model.state_dict().items())


def test_two_processes_with_adapters_see_the_same_steps_as_one(in_two_processes, uninterrupted):
    folder = in_two_processes["lora"]
    for found, expected in zip(losses(read_log(folder)), losses(uninterrupted[0].log), strict=True):
        assert found == {
            k: v if isinstance(v, str) else pytest.approx(v, rel=2e-3, abs=1e-5) for k, v in expected.items()
        }
    student = load_student(folder / "final")
    for name, value in uninterrupted[0].model.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, atol=2e-3, rtol=2e-2)


def test_bf16_trains_adapters_from_the_same_loss(tiny_cache, tmp_path, uninterrupted):
    found = train(make_config(tiny_cache[0], tmp_path / "run", dtype="bfloat16")).log
    for half, full in zip(found[:2], uninterrupted[0].log, strict=False):
        assert half["total"] == pytest.approx(full["total"], rel=0.03)


def test_another_rank_or_preset_does_not_resume(tiny_cache, uninterrupted):
    folder = uninterrupted[0].final.parent
    for changes in ({"lora": {"rank": 8}}, {"sft": {"steps": 2, "batch_size": 4, "trainable": "all"}}):
        with pytest.raises(ConfigError, match=r"belongs to another run.*Use another --output"):
            train(make_config(tiny_cache[0], folder, **changes))


def test_a_base_that_changed_under_a_checkpoint_is_refused():
    student, _ = mobilevlm_student()
    options = {"rank": 2, "alpha": 4.0, "dropout": 0.0}
    parts = TrainedParts(student, **options)
    parts.begin(trainable="lora")
    state = parts.state()
    other, _ = mobilevlm_student(seed=1)
    with pytest.raises(ConfigError, match=r"not those that this run began with.*another --output"):
        TrainedParts(other, **options).replay(state)
    same, _ = mobilevlm_student()
    again = TrainedParts(same, **options)
    again.replay(state)
    with pytest.raises(ConfigError, match=r"other parts than this phase trains: .*lora"):
        again.load(state)  # its adapters are not in yet
    again.begin(trainable="lora")
    again.load(state)
    assert again.state()["frozen"] == state["frozen"]


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize(
    ("trainable", "freeze", "trained"),
    [
        ("projector", (), {"projector"}),
        ("all", (), {"projector", "layers", "embed_tokens", "lm_head"}),
        ("all", ("embeddings", "lm_head"), {"projector", "layers"}),
        ("all", ("projector",), {"layers", "embed_tokens", "lm_head"}),
        ("lora", (), {"projector", "lora_"}),
        ("lora", ("projector",), {"lora_"}),
    ],
)
def test_a_phase_trains_the_parts_it_names(kind, trainable, freeze, trained):
    student, _ = STUDENTS[kind]()
    parts = TrainedParts(student, rank=2, alpha=4.0, dropout=0.0)
    parameters = parts.begin(trainable=trainable, freeze=freeze)["lr"]
    names = [name for name, value in student.named_parameters() if value.requires_grad]
    assert len(parameters) == len(names)
    assert not any("vision" in name for name in names)
    words = {"projector", "lora_", "layers", "embed_tokens", "lm_head"}
    found = {word for word in words if any(word in name for name in names)}
    if trainable == "lora":
        assert all(".lora_" in name or "projector" in name for name in names)
        found -= {"layers"}
    assert found == trained


def test_nothing_left_to_train_is_refused(tiny_cache, tmp_path):
    with pytest.raises(ConfigError, match=r"freeze is \('projector',\).*nothing would be trained"):
        make_config(tiny_cache[0], tmp_path, dpt={"trainable": "projector", "freeze": ["projector"]})


def test_adapters_of_another_student_are_refused():
    student, _ = mobilevlm_student()
    add_adapters(student, rank=2, alpha=4, dropout=0.0, seed=0)
    stored = {name: value.detach().clone() for name, value in adapter_parameters(student).items()}
    merge_adapters(student)
    add_adapters(student, rank=3, alpha=4, dropout=0.0, seed=0)
    with pytest.raises(ModelError, match="not those of this student"):
        load_adapters(student, stored)


def test_without_peft_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def fail(name, *arguments, **options):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    student, _ = mobilevlm_student()
    with pytest.raises(ConfigError, match=r"needs peft.*pip install 'vlm-distill-cache\[lora\]'"):
        add_adapters(student, rank=2, alpha=4, dropout=0.0, seed=0)


def test_a_language_model_without_a_list_of_layers_is_refused_by_name():
    student = nn.Module()
    student.language_model = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"Linear keeps no list of decoder `layers`.*trainable: all"):
        add_adapters(student, rank=2, alpha=4, dropout=0.0, seed=0)


def test_the_text_configuration_of_the_tiny_students_is_what_the_tests_count_on():
    student, _ = mobilevlm_student()
    assert isinstance(student.language_model.config, LlamaConfig)

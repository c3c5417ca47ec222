"""A vision tower that is trained, and parts with learning rates of their own."""

import copy

import pytest
import torch
from broken_runs import Copies
from lora_runs import equal_weights, losses, save_teacher
from test_library_student import make_batch, opened  # noqa: F401 - a fixture
from tiny_cache import build_tiny_cache
from tiny_families import TINY
from tiny_students import library_student, mobilevlm_student
from tower_runs import TOWER
from tower_runs import make_config as mixed_config
from train_runs import make_config

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.families.table import unlisted_family
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.processors import module_fingerprint
from vlm_distill_cache.stage2_student.config import PhaseConfig, describe
from vlm_distill_cache.stage2_student.students.build import load_student
from vlm_distill_cache.stage2_student.students.library import LibraryStudent
from vlm_distill_cache.stage2_student.students.model import model_inputs_of
from vlm_distill_cache.stage2_student.students.tower import check_tower_is_free, tower_parameters
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.log import read_log
from vlm_distill_cache.stage2_student.training.parts import TrainedParts, checkpoint_layers
from vlm_distill_cache.stage2_student.training.preparation import prepare
from vlm_distill_cache.stage2_student.training.steps import build_optimizer


@pytest.fixture(scope="module")
def whole(tiny_cache, tmp_path_factory):
    """A run whose tower is trained, what it began with, and what a kill after each step leaves."""
    copies = Copies(tmp_path_factory.mktemp("tower") / "whole")
    config = make_config(tiny_cache[0], copies.output, **TOWER)
    before = copy.deepcopy(prepare(config).student.state_dict())
    return train(config, after_step=copies), before, copies


def test_all_is_trained_but_the_layers_of_the_tower_that_nothing_reads(whole):
    result, before, _ = whole
    tower = "model.vision_tower.vision_tower.vision_model."
    unused = (
        f"{tower}encoder.layers.1.",
        f"{tower}post_layernorm.",
    )  # of two layers the first one's output is projected
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(unused), name


def test_what_is_saved_is_the_trained_tower_and_opens_again(whole, tiny_cache):
    result, _, _ = whole
    again = load_student(result.final)
    assert equal_weights(again, result.model.cpu())
    assert module_fingerprint(again.vision_encoder) != open_cache(tiny_cache[0]).plan.fingerprints["vision_tower"]


def test_a_killed_run_goes_on_exactly(whole, tiny_cache, tmp_path):
    result, _, copies = whole
    copies.killed_after(2, tmp_path / "killed")
    resumed = train(make_config(tiny_cache[0], tmp_path / "killed", **TOWER))
    assert losses(resumed.log) == losses(result.log)
    assert equal_weights(resumed.model, result.model)


@pytest.mark.slow
def test_two_processes_see_the_same_steps_as_one_where_some_see_no_picture(in_two_processes, tmp_path):
    """A process whose micro-batches are text alone has no gradient of the tower; it does not keep the other waiting."""
    expected, two = train(mixed_config(in_two_processes["mixed"], tmp_path / "one")), in_two_processes["tower"]
    for found, step in zip(losses(read_log(two)), losses(expected.log), strict=True):
        assert found == {k: v if isinstance(v, str) else pytest.approx(v, rel=2e-3, abs=1e-5) for k, v in step.items()}
    student = load_student(two / "final")
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, atol=2e-3, rtol=2e-2)


def test_a_library_student_trains_its_tower_and_resumes_exactly(tiny_cache, tmp_path):
    options = TOWER | {"student": str(save_teacher(tmp_path / "student", seed=1))}
    copies = Copies(tmp_path / "whole")
    result = train(make_config(tiny_cache[0], copies.output, **options), after_step=copies)
    copies.killed_after(3, tmp_path / "killed")
    resumed = train(make_config(tiny_cache[0], tmp_path / "killed", **options))
    assert equal_weights(resumed.model, result.model)
    before = prepare(make_config(tiny_cache[0], tmp_path / "new", **options)).student.state_dict()
    still = {name for name, value in result.model.state_dict().items() if torch.equal(value, before[name])}
    assert still == {name for name in before if "vision_tower.encoder.layers.1." in name or "post_layernorm" in name}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.slow(quick=("paligemma", "paligemma2", "compodistill"))
def test_the_trained_parameters_of_a_tower_are_those_that_a_loss_reaches(opened, name):  # noqa: F811
    student, encoder = opened(name)
    model, batch = student.model, make_batch(encoder)
    names = tower_parameters(model, batch)
    parts = TrainedParts(model, rank=1, alpha=1.0, dropout=0.0)
    (trained,) = parts.begin(trainable="tower", tower=names).values()
    model(**model_inputs_of(model, batch)).logits.square().sum().backward()
    reached = {id(value) for value in model.parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    assert {id(value) for value in trained} == reached
    assert names
    model.requires_grad_(True)
    model(**model_inputs_of(model, batch)).logits.square().sum().backward()
    assert {id(value) for value in model.parameters() if value.grad is not None} == reached
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("make", [mobilevlm_student, library_student])
def test_a_trained_tower_computes_what_a_frozen_one_does_and_has_the_librarys_gradient(make):
    student, inputs = make()
    student.eval()
    frozen = student(**inputs).logits
    student.requires_grad_(True)
    free = student(**inputs).logits
    assert torch.equal(frozen, free)
    free.square().sum().backward()
    encoder = student.vision_encoder if make is mobilevlm_student else student.model.model.vision_tower
    own = {name: value.grad for name, value in encoder.named_parameters() if value.grad is not None}
    # The chain rule by hand: the library's tower, and the gradient of what it gives.
    core = student.model if make is mobilevlm_student else student.model.model
    projector = core.mm_projector if make is mobilevlm_student else core.multi_modal_projector
    given = []
    hook = projector.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    loss = student(**inputs).logits.square().sum()
    hook.remove()
    (of_features,) = torch.autograd.grad(loss, given)
    features = encoder(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    wanted = torch.autograd.grad(features, list(encoder.parameters()), of_features, allow_unused=True)
    for (name, _), gradient in zip(encoder.named_parameters(), wanted, strict=True):
        assert (gradient is None) == (name not in own), name
        if gradient is not None:
            torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [mobilevlm_student, library_student])
def test_checkpointed_layers_of_a_tower_give_the_same_gradient_and_keep_less(make):
    found = []
    for tower in (None, False, True):
        student, inputs = make()
        student.train().requires_grad_(True)
        if tower is not None:
            checkpoint_layers(student, tower=tower)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = student(**inputs).logits.square().mean()
        loss.backward()
        grads = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
        found.append((loss.detach(), grads, sum(kept)))
    for loss, grads, _ in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert grads.keys() == found[0][1].keys()
        assert all(torch.allclose(grads[name], value, rtol=1e-5, atol=1e-7) for name, value in found[0][1].items())
    assert found[2][2] < found[1][2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": "taf"}, r"phase dft: trainable=tower: .*teacher's projector \(TAF\).*projector=mlp"),
        ({"data": "TEXT"}, r"phase dft: trainable=tower, but no sample .* has a picture.*dft.trainable=all"),
    ],
)
def test_a_tower_that_must_stay_or_that_nothing_reaches_is_refused(tiny_cache, tmp_path, changes, message):
    cache, data = tiny_cache[0], changes.get("data")
    if data:
        lines = '{"messages": [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "red"}]}\n'
        (tmp_path / "t.jsonl").write_text(lines * 3)
        cache, changes = tmp_path / "cache", {"data": str(tmp_path / "t.jsonl")}
        build_tiny_cache(cache, dataset=open_dataset(str(tmp_path / "t.jsonl")), signals=("logits",))
    dft = {"steps": 1, "batch_size": 2, "trainable": "tower", "losses": {"logits": 1.0}}
    with pytest.raises(ConfigError, match=message):
        prepare(make_config(cache, tmp_path / "run", **({"phases": ["dft"], "dft": dft} | changes)))


def test_the_tower_of_a_family_that_nobody_described_is_refused():
    student, _ = library_student()
    unlisted = LibraryStudent(student.model, unlisted_family())
    with pytest.raises(ConfigError, match=r"'llava', which is not in the table of families.*dft.trainable=all"):
        check_tower_is_free(unlisted, phase="dft", where="student x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tower_lr": 1e-4}, r"tower_lr is 0.0001; it must be unset where trainable is not tower"),
        ({"projector_lr": 1e-4, "freeze": ("projector",)}, r"projector_lr is 0.0001; it must be unset where freeze"),
        ({"projector_lr": 0.0}, r"projector_lr is 0.0; it must be a finite number above 0"),
        ({"trainable": "tower", "tower_lr": float("inf")}, r"tower_lr is inf; it must be a finite number"),
    ],
)
def test_rates_that_nothing_would_have_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PhaseConfig(**options)


# Learning rates of parts.


def test_each_part_has_its_rate_scheduled_alike_and_logged(whole):
    records = whole[0].log
    assert [record["projector_lr"] for record in records] == pytest.approx([r["lr"] * 0.25 for r in records])
    assert [record["tower_lr"] for record in records] == pytest.approx([r["lr"] * 0.5 for r in records])


@pytest.mark.parametrize("trainable", ["all", "lora", "projector"])
@pytest.mark.slow(quick=("all",))
def test_a_projectors_own_rate_moves_the_projector_alone_and_the_same_rate_changes_nothing(
    tiny_cache, tmp_path, trainable
):
    def run(name, **more):
        dft = {"steps": 1, "batch_size": 4, "lr": 1e-3, "warmup": 0.0, "trainable": trainable, **more}
        config = make_config(tiny_cache[0], tmp_path / name, phases=["dft"], dft=dft, lora={"rank": 2, "alpha": 4.0})
        return train(config).model.state_dict()

    plain, same, slow = run("plain"), run("same", projector_lr=1e-3), run("slow", projector_lr=1e-5)
    start = prepare(make_config(tiny_cache[0], tmp_path / "start")).student.state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(same[name], value, rtol=0, atol=1e-7)  # norms add up in another order
        if ".mm_projector." in name:
            # AdamW's first step is the rate, whatever the size of the gradient.
            assert (slow[name] - start[name]).abs().max() == pytest.approx(1e-5, rel=0.02)
            assert (value - start[name]).abs().max() == pytest.approx(1e-3, rel=0.02)
        else:
            torch.testing.assert_close(slow[name], value, rtol=0, atol=1e-7)


def test_without_rates_of_parts_a_run_and_its_optimizer_are_described_as_before(tiny_cache, tmp_path):
    config = make_config(tiny_cache[0], tmp_path / "run")
    described = describe(config, {})
    assert not {"projector_lr", "tower_lr"} & {key for phase in ("dpt", "dft", "sft") for key in described[phase]}
    own = make_config(tiny_cache[0], tmp_path / "run", dft={"projector_lr": 1e-4})
    assert describe(own, {})["dft"]["projector_lr"] == 1e-4
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = build_optimizer({"lr": [matrix, vector]}, {"lr": 0.1}, weight_decay=0.5).param_groups
    assert [(group["params"], group["lr"], group["weight_decay"]) for group in groups] == [
        ([matrix], 0.1, 0.5), ([vector], 0.1, 0.0)
    ]  # fmt: skip
    assert all("rate" not in group for group in groups)

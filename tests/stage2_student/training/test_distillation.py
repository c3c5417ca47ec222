"""`DistillationDataset` and `DistillationLoss` in somebody else's loop: the objective of `train()`, whatever is around it."""

import copy
import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from tiny_cache import make_teacher
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from train_runs import make_config
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import vlm_distill_cache as vdc
from vlm_distill_cache.data import builtin
from vlm_distill_cache.stage2_student import cli
from vlm_distill_cache.stage2_student.losses.objective import Shares
from vlm_distill_cache.stage2_student.training.preparation import prepare

DATA = "shapes:images=20,seed=5"
LOSSES = {"logits": 1.0, "answer_attention": 1.0, "visual_map": 0.5, "visual_columns": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA of other weights than the teacher's."""
    folder = tmp_path_factory.mktemp("students") / "llava"
    for part in (make_teacher(seed=1).model, builtin.load_tokenizer(), builtin.load_image_processor()):
        part.save_pretrained(folder)
    return folder


def make(cache, student, **options):
    return vdc.DistillationDataset(cache, student, vdc.LossWeights(**LOSSES), data=DATA, **options)


@pytest.fixture
def dataset(tiny_cache, folder):
    return make(tiny_cache[0], folder)


def batches_of(dataset, *sizes):
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        dataset.collate([dataset[start + i] for i in range(size)]) for start, size in zip(starts, sizes, strict=True)
    ]


def gradients(model, *totals):
    model.zero_grad()
    for total in totals:
        total.backward()
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient.clone() for name, gradient in named.items()}


def assert_same(found, expected, **limits):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **limits)


@pytest.mark.parametrize("student", ["mobilevlm-tiny", "folder"])
def test_loss_and_gradient_are_those_of_a_run(student, tiny_cache, folder, tmp_path):
    student = str(folder) if student == "folder" else student
    losses = {"losses": LOSSES, "steps": 1}
    run = prepare(make_config(tiny_cache[0], tmp_path, student=student, phases=["dft"], dft=losses))
    dataset = make(tiny_cache[0], student)
    loss = vdc.DistillationLoss(dataset)
    (batch,) = batches_of(dataset, 7)
    found = loss(dataset.student, batch)
    from vlm_distill_cache.common.attention.capture import AttentionCapture

    capture = AttentionCapture(run.student.language_model)
    expected = run.phases[0].objective(run.student, capture, run.phases[0].dataset.batch(range(7)), Shares())
    assert_same(found.named(), expected.named(), atol=0, rtol=1e-6)
    inner = run.student.model if student == str(folder) else run.student
    ours = gradients(inner, expected.total)
    assert_same(gradients(dataset.student, found.total), ours, atol=1e-7, rtol=1e-5)


def test_a_share_is_that_of_a_run_and_its_seed_is_part_of_the_fingerprint(tiny_cache, tmp_path):
    made = [make(tiny_cache[0], "mobilevlm-tiny", data_share=0.25, seed=seed) for seed in (0, 0, 1)]
    run = prepare(
        make_config(tiny_cache[0], tmp_path, student="mobilevlm-tiny", phases=["dft"], data_share=0.25, seed=1)
    )
    assert list(made[2].sample_ids) == list(run.phases[0].dataset.sample_ids)
    assert len(made[2]) == 5
    prints = [dataset.fingerprint for dataset in made]
    assert prints[0] == prints[1] != prints[2]
    whole = [make(tiny_cache[0], "mobilevlm-tiny", seed=seed).fingerprint for seed in (0, 1)]
    assert whole[0] == whole[1]


@pytest.mark.parametrize("given_as", ["folder", "parts", "processor"])
@pytest.mark.slow(quick=("processor",))
def test_a_model_that_the_caller_has_loaded_is_used_as_it_is(given_as, dataset, tiny_cache, folder):
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    whole = {"patch_size": 12, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processors = {
        "folder": folder,
        "parts": (dataset.tokenizer, dataset.image_processor),
        "processor": LlavaProcessor(dataset.image_processor, dataset.tokenizer, **whole),
    }
    given = make(tiny_cache[0], model, processor=processors[given_as])
    assert given.student is model
    assert all(parameter.requires_grad for parameter in model.parameters())  # what is trained is the caller's choice
    (batch,), (expected) = batches_of(given, 5), batches_of(dataset, 5)
    found = vdc.DistillationLoss(given)(model, batch)
    assert_same(found.named(), vdc.DistillationLoss(dataset)(dataset.student, expected[0]).named(), atol=0, rtol=0)


def test_micro_batches_with_their_shares_have_the_gradient_of_one_big_batch(dataset):
    loss, model = vdc.DistillationLoss(dataset), dataset.student
    (whole,), parts = batches_of(dataset, 12), batches_of(dataset, 1, 7, 4)
    big = loss(model, whole)
    shared = [loss(model, batch, share) for batch, share in zip(parts, loss.shares(parts), strict=True)]
    for name, value in big.named().items():
        torch.testing.assert_close(sum(one.named()[name] for one in shared), value, msg=name)
    expected = gradients(model, big.total)
    assert_same(gradients(model, *[one.total for one in shared]), expected, atol=1e-6, rtol=1e-4)

    # Two processes, one of two micro-batches; each backward is divided by accelerate's steps, their mean taken by DDP.
    units = [loss_units([part]) for part in parts]
    total = sum(units)

    def process(mine):
        accelerator = SimpleNamespace(
            num_processes=2, gradient_accumulation_steps=2, device="cpu", reduce=lambda local, reduction: total
        )
        shares = loss.shares(mine, accelerator)
        return gradients(model, *[loss(model, b, s).total / 2 for b, s in zip(mine, shares, strict=True)])

    one, other = process(parts[:2]), process(parts[2:])
    assert_same({name: (one[name] + other[name]) / 2 for name in one}, expected, atol=1e-6, rtol=1e-4)


def test_the_documented_accelerate_loop_takes_the_steps_of_big_batches(dataset, tiny_cache, folder, page_loop):
    def start():
        made = make(tiny_cache[0], folder, limit=7)
        optimizer = torch.optim.SGD([p for p in made.student.parameters() if p.requires_grad], lr=0.1)
        return made, vdc.DistillationLoss(made), optimizer

    made, loss, optimizer = start()
    loader = DataLoader(made, batch_size=2, sampler=made.sampler(seed=0), collate_fn=made.collate)
    names = {"loss": loss, "model": made.student, "optimizer": optimizer, "loader": loader}
    for _ in range(2):  # four batches, the last of one sample, then three: an odd one is left over
        exec(page_loop, names)
        names["loader"] = DataLoader(made, batch_size=3, sampler=range(7), collate_fn=made.collate)
    other, loss, optimizer = start()
    order = list(other.sampler(seed=0))
    for places in (order[:4], order[4:], range(6), range(6, 7)):
        loss(other.student, other.collate([other[place] for place in places])).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(made.student.state_dict(), other.student.state_dict(), atol=1e-6, rtol=1e-4)


@pytest.fixture
def page_loop():
    AcceleratorState._reset_state(reset_partial_state=True)
    page = (Path(__file__).resolve().parents[3] / "docs" / "python.md").read_text()
    yield next(code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "accelerator.backward" in code)
    AcceleratorState._reset_state(reset_partial_state=True)


def loss_units(batches):
    from vlm_distill_cache.stage2_student.losses.objective import units_of

    return torch.tensor([units_of(batch) for batch in batches], dtype=torch.float64).sum(dim=0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it by its name of old
def test_wrappers_change_nothing(dataset, tmp_path):
    from peft import LoraConfig, get_peft_model

    loss, model = vdc.DistillationLoss(dataset), dataset.student
    (batch,) = batches_of(dataset, 4)
    expected = loss(model, batch)
    own = gradients(model, expected.total)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # the newer name first
    model.train()
    assert_same(gradients(model, loss(model, batch).total), own, atol=1e-7, rtol=1e-5)
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        found = loss(wrapped, batch)
        assert_same(gradients(wrapped, found.total), own, atol=1e-7, rtol=1e-5)
    finally:
        torch.distributed.destroy_process_group()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    found = loss(adapted, batch)
    assert_same(found.named(), expected.named(), atol=1e-6, rtol=1e-5)
    assert {name.split(".")[-3] for name in gradients(adapted, found.total)} == {"lora_A", "lora_B"}


def test_autocast_is_the_models_alone(dataset):
    loss, model = vdc.DistillationLoss(dataset), dataset.student
    (batch,) = batches_of(dataset, 4)
    exact = loss(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss(model, batch)
    accelerated = loss(Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model), batch)
    assert_same(rounded.named(), accelerated.named(), atol=1e-6, rtol=1e-5)
    assert rounded.total.item() != exact.total.item()
    for name, value in exact.named().items():
        assert rounded.named()[name].dtype == torch.float32
        torch.testing.assert_close(rounded.named()[name], value, atol=0.02, rtol=0.05, msg=name)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_samplers_and_pickled_copies_read_the_same(dataset):
    copied = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - ours
    assert copied.student is None  # the model does not travel
    order = dataset.sampler(seed=3, window=2)
    first, second = list(order), list(order)
    assert sorted(first) == sorted(second) == list(range(len(dataset)))
    assert first != second
    order.set_epoch(0)
    assert list(order) == first == list(copied.sampler(seed=3, window=2))
    order.set_epoch(0)
    loader = DataLoader(dataset, batch_size=6, sampler=order, collate_fn=dataset.collate, num_workers=1)
    for start, batch in zip(range(0, len(first), 6), loader, strict=True):
        expected = copied.collate([copied[place] for place in first[start : start + 6]])
        assert batch.inputs.sample_ids == expected.inputs.sample_ids
        assert len(batch) == len(expected.inputs)
        assert torch.equal(batch.targets["visual_map"].teacher, expected.targets["visual_map"].teacher)
    assert dataset[dataset.sample_ids[3]].encoded.sample_id == dataset[3 - len(dataset)].encoded.sample_id


def test_what_is_saved_is_a_student_again(dataset, tiny_cache, tmp_path):
    dataset.save_student(tmp_path / "student")
    again = make(tiny_cache[0], tmp_path / "student")
    (one,), (other,) = batches_of(dataset, 3), batches_of(again, 3)
    pair = [vdc.DistillationLoss(of)(of.student, batch) for of, batch in ((dataset, one), (again, other))]
    assert_same(pair[0].named(), pair[1].named(), atol=0, rtol=0)
    # It has no provenance: what it is and what can be done with it is said, and it is scored with a cache.
    student = str(tmp_path / "student")
    for command in (
        ["evaluate", student],
        ["export", student, "--output", str(tmp_path / "x")],
        ["push", student, "me/x"],
    ):
        refused = CliRunner().invoke(cli.main, command)
        assert refused.exit_code == 1
        assert "a model without distillation.json, as `save_student`" in refused.output
        assert "finished" not in refused.output
    scored = CliRunner().invoke(cli.main, ["evaluate", student, "--cache", str(tiny_cache[0]), "--limit", "2"])
    assert "top-1 agrees with teacher" in scored.output, scored.output
    assert "Next" not in scored.output


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it by its name of old
@pytest.mark.parametrize("given", ["wrapper", "inner"])
def test_adapters_are_added_to_what_is_saved_and_not_to_the_model_in_training(given, tiny_cache, folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    settings = LoraConfig(
        r=2, target_modules=["q_proj", "linear_1"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    adapted = get_peft_model(model, settings)
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    dataset = make(tiny_cache[0], adapted if given == "wrapper" else model, processor=folder)
    assert dataset.student is (adapted if given == "wrapper" else model)
    (batch,) = batches_of(dataset, 4)
    with torch.no_grad():
        trained = vdc.DistillationLoss(dataset)(adapted.eval(), batch).named()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    dataset.save_student(tmp_path / "student")
    assert_same(adapted.state_dict(), before, atol=0, rtol=0)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "student")
    assert_same(vdc.DistillationLoss(dataset)(again.eval(), batch).named(), trained, atol=1e-5, rtol=1e-4)
    adapted.base_model.disable_adapter_layers()
    with pytest.raises(vdc.ModelError, match="adapters are switched off"):
        dataset.save_student(tmp_path / "student")


def test_data_sets_losses_and_models_of_different_kinds_are_not_mixed(dataset, tiny_cache, folder):
    loss, model, processor = (
        vdc.DistillationLoss(dataset),
        dataset.student,
        (dataset.tokenizer, dataset.image_processor),
    )
    (batch,) = batches_of(dataset, 2)
    for losses in (
        vdc.LossWeights(),
        vdc.LossWeights(**LOSSES, temperature=2.0),
        vdc.LossWeights(**LOSSES, logit_kind="tvd"),
    ):
        other = vdc.DistillationDataset(tiny_cache[0], model, losses, data=DATA, processor=processor)
        with pytest.raises(vdc.ConfigError, match=r"does not fit: losses .*; expected .*visual_columns"):
            loss(model, other.collate([other[0]]))
        with pytest.raises(vdc.ConfigError, match=r"sample .* does not fit: losses"):
            dataset.collate([dataset[0], other[1]])
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers += 1
    config.text_config.layer_types = None
    with pytest.raises(
        vdc.ModelError, match=r"layers \d.*; expected llava.*Make another DistillationDataset with this model"
    ):
        loss(type(model)(config), batch)
    same = vdc.DistillationDataset(tiny_cache[0], model, vdc.LossWeights(**LOSSES), data=DATA, processor=processor)
    assert_same(loss(model, same.collate([same[0], dataset[1]])).named(), loss(model, batch).named(), atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it by its name of old
def test_misuse_ends_in_words(dataset, tiny_cache, folder, tmp_path):
    from peft import PromptTuningConfig, get_peft_model
    from transformers import LlavaConfig

    model, processor, copied = dataset.student, (dataset.tokenizer, dataset.image_processor), copy.deepcopy(dataset)
    (batch,) = batches_of(dataset, 2)
    loss = vdc.DistillationLoss(copied)  # needs no model of its own
    assert loss(model, batch).total > 0
    small = copy.deepcopy(dataset.image_processor)
    small.size = small.crop_size = {"height": 12, "width": 12}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with torch.device("meta"):
        empty = type(model)(LlavaConfig.from_pretrained(folder))

    def given(student=model, processor=processor, cache=tiny_cache[0], **options):
        return vdc.DistillationDataset(
            cache, student, vdc.LossWeights(**LOSSES), data=DATA, processor=processor, **options
        )

    def says(*records):
        return lambda: dataset.live_batch([0, 1], lambda samples: records)

    tuned = get_peft_model(copy.deepcopy(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    read = dataset[0].encoded
    heads = {"labels": read.labels[read.supervised_rows], "tiles": None, "image_hash": read.image_hash}
    whole = heads | dict.fromkeys(("logits", "answer_attention", "visual_map", "visual_columns"), 1)
    misuses = [
        (lambda: given(student=model.model), "no output projection.*AutoModelForImageTextToText"),
        (lambda: given(student=empty), "meta device"),
        (lambda: given(processor=(dataset.tokenizer, small)), "12 x 12 pixels, its vision tower reads"),
        (lambda: given(limit="3"), "limit is '3'"),
        (lambda: given(limit=3.5), r"limit is 3\.5"),
        (lambda: given(cache=[tiny_cache[0]]), "cache is list.*mixture"),
        (lambda: loss(tuned, batch), "PromptTuningConfig puts tokens before"),
        (lambda: loss(model, [batch]), "batch is list"),
        (lambda: vdc.DistillationLoss([1]), "dataset is list"),
        (lambda: dataset[0:2], "expected one position or one id"),
        (lambda: dataset[1.5], r"sample 1\.5 .float.; expected one"),
        (lambda: dataset.collate([]), "one or more"),
        (lambda: next(iter(DataLoader(dataset, batch_size=2))), "give collate_fn=dataset.collate"),
        (lambda: dataset.sampler(seed=-1), "seed is -1"),
        (lambda: dataset.sampler(seed="a"), "seed is 'a'"),
        (lambda: copied.save_student(tmp_path / "new"), "holds no model.*give model="),
        (lambda: dataset.save_student(tmp_path / "file"), "is a file"),
        (lambda: dataset.save_student(tmp_path / "other"), "something else .bert.*another folder"),
        (says({}), r"gave 1 records"),
        (says({}, None), r"expected a dict of labels, tiles, image_hash"),
        (says(whole, whole), r"the live teacher on sample '.*expected labels"),
        (lambda: dataset.live_batch([0], lambda samples: None), "0 records .NoneType.; expected a list of 1"),
    ]  # fmt: skip
    for misuse, words in misuses:
        with pytest.raises(vdc.DistillError, match=f"(?s){words}"):
            misuse()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("step", ["do_rescale", "do_normalize"])
def test_a_processor_that_leaves_out_a_step_is_worth_a_line(step, tiny_cache, dataset, folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "student")
    file = tmp_path / "student" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {step: False}))
    assert "image processor" not in caplog.text
    make(tiny_cache[0], tmp_path / "student")
    assert f"its image processor has {step} false, which CLIP" in caplog.text


def test_what_does_not_fit_is_refused_in_words(dataset, tiny_cache, folder, tmp_path):
    from tiny_families import save_tiny

    cache, model = tiny_cache[0], dataset.student
    processor = (dataset.tokenizer, dataset.image_processor)
    other = LlavaForConditionalGeneration.from_pretrained(save_tiny("llava", tmp_path / "llava"))
    refused = [
        ({"student": model}, "a model needs the processor"),
        ({"student": folder, "processor": processor}, "a folder or a name brings its own"),
        ({"student": torch.nn.Linear(1, 1), "processor": folder}, "the model is a Linear; expected a PreTrainedModel"),
        ({"student": folder, "losses": {"logits": 1.0}}, "losses is dict; expected LossWeights"),
        ({"student": model, "processor": 7}, "expected its checkpoint's folder"),
        ({"student": other, "processor": processor}, "configuration has image token 26., its processor .*of two checkpoints"),
        ({"student": tmp_path / "llava"}, r"(?s)tokenizer of student .*llava: fingerprint .* cannot be distilled"),
        ({"student": folder, "losses": vdc.LossWeights(hidden=1.0)}, r"does not hold: hidden.*losses=LossWeights\(NAME=VALUE\)"),
        ({"student": folder, "losses": vdc.LossWeights(logits=1.0, temperature=3.0)}, "holds tail masses at"),
        ({"student": folder, "data": "shapes:images=20,seed=6"}, "is not the one .* was built from"),
        ({"student": folder, "colour": "blue"}, "no option colour; options are template, .*, projector"),
        ({"student": model, "processor": processor, "projector": "mlp"}, "no option projector of a model that is given"),
        ({"student": "no/such folder"}, "is neither a known student"),
    ]  # fmt: skip
    for arguments, words in refused:
        with pytest.raises(vdc.DistillError, match=words):
            vdc.DistillationDataset(cache, **({"data": DATA} | arguments))
    with pytest.raises(KeyError, match=r"no sample 'x' among the 20.*take one of sample_ids"):
        dataset["x"]
    loss, (batch,) = vdc.DistillationLoss(dataset), batches_of(dataset, 2)
    with pytest.raises(vdc.ModelError, match="Make another DistillationDataset with this model"):
        loss(other, batch)
    with pytest.raises(vdc.ModelError, match=r"wrapped by DataParallel.*accelerate launch"):
        loss(torch.nn.DataParallel(model), batch)
    with pytest.raises(vdc.ModelError, match=r"without torch\.compile"):
        loss(torch.compile(model), batch)

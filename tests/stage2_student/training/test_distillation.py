"""`DistillationDataset` and `DistillationLoss` in somebody else's loop: the objective of `train()`, whatever is around it."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_cache import make_teacher
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from train_runs import make_config
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import vlm_distill_cache as vdc
from vlm_distill_cache.data import builtin
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


@pytest.mark.parametrize("given_as", ["folder", "parts", "processor"])
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

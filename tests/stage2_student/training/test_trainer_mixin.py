"""The mixin in `transformers.Trainer` and in TRL's: a step is one of `train()`, and the log has each term."""

import pytest
import torch
import transformers
from tiny_cache import make_teacher

import vlm_distill_cache as vdc
from vlm_distill_cache.data import builtin

DATA = "shapes:images=20,seed=5"
LOSSES = vdc.LossWeights(logits=1.0, answer_attention=2.0, visual_columns=1.0)


class Trainer(vdc.DistillationTrainerMixin, transformers.Trainer):
    pass


@pytest.fixture
def student(tmp_path):
    for part in (make_teacher(seed=1).model, builtin.load_tokenizer(), builtin.load_image_processor()):
        part.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


@pytest.fixture
def dataset(tiny_cache, student):
    return vdc.DistillationDataset(tiny_cache[0], student, LOSSES, data=DATA)


def options(folder, **others):
    return {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1,
    } | others  # fmt: skip


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def named(losses):
    return {name: value.item() for name, value in losses.named().items()}


def test_a_step_of_unequal_micro_batches_is_the_step_of_one_big_batch_and_the_log_says_its_terms(dataset, tmp_path):
    loss, before = vdc.DistillationLoss(dataset), weights_of(dataset.student)
    order = list(dataset.sampler(seed=42))  # the trainer's own seed
    big = loss(dataset.student, dataset.collate([dataset[place] for place in order]))
    big.total.backward()
    expected = {
        name: before[name] - 0.1 * parameter.grad if parameter.grad is not None else before[name]
        for name, parameter in dataset.student.named_parameters()
    }
    dataset.student.zero_grad()
    arguments = transformers.TrainingArguments(
        **options(tmp_path / "run", per_device_train_batch_size=3, gradient_accumulation_steps=7, max_steps=1)
    )  # 20 samples: six batches of three and one of two
    trainer = Trainer(args=arguments, train_dataset=dataset, eval_dataset={"a": dataset, "b": dataset})
    trainer.train()
    after = weights_of(dataset.student)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-4, msg=name)
    logged = trainer.state.log_history[0]
    for name, value in named(big).items():
        assert logged["loss" if name == "total" else name] == pytest.approx(value, rel=1e-4), name

    # An evaluation's figures are those of the whole set, however it is cut into batches.
    trainer.args.per_device_eval_batch_size = 6
    dataset.student.eval()
    with torch.no_grad():
        exact = named(loss(dataset.student, dataset.collate([dataset[place] for place in range(len(dataset))])))
    found = trainer.evaluate()
    for prefix in ("eval_a_", "eval_b_"):
        for name in ("lm", "logits", "answer_attention", "visual_columns"):
            assert found[prefix + name] == pytest.approx(exact[name], rel=1e-4), name
        assert found[f"{prefix}loss"] == pytest.approx(exact["total"], rel=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    again = vdc.DistillationDataset(dataset.cache, tmp_path / "saved", LOSSES, data=DATA)
    assert all(torch.equal(value, after[name]) for name, value in weights_of(again.student).items())


def test_a_wrong_data_set_is_refused(dataset, tiny_cache, student, tmp_path):
    arguments = transformers.TrainingArguments(**options(tmp_path / "run"))
    for wrong in ({"train_dataset": [1, 2]}, {"train_dataset": dataset, "eval_dataset": [1]}, {}):
        with pytest.raises(vdc.ConfigError, match=r"expected vlm_distill_cache\.DistillationDataset"):
            Trainer(args=arguments, **wrong)
    other = vdc.DistillationDataset(tiny_cache[0], student, vdc.LossWeights(logits=2.0), data=DATA)
    with pytest.raises(
        vdc.ConfigError, match=r"do not fit each other: losses .*logits.: 2.0.*; expected .*visual_columns"
    ):
        Trainer(args=arguments, train_dataset=dataset, eval_dataset=other)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL and peft, by its name of old
def test_trl_takes_the_same_step_in_adapters(dataset, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from peft import LoraConfig

    class SFTTrainer(vdc.DistillationTrainerMixin, trl.SFTTrainer):
        pass

    order = list(dataset.sampler(seed=42))[:6]
    with torch.no_grad():
        expected = named(vdc.DistillationLoss(dataset)(dataset.student, dataset.collate([dataset[p] for p in order])))
    arguments = trl.SFTConfig(
        **options(
            tmp_path / "run", per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2, bf16=False
        ),
    )
    adapters = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    trainer = SFTTrainer(args=arguments, train_dataset=dataset, eval_dataset=dataset, peft_config=adapters)
    trainer.train()
    for name, value in expected.items():
        assert trainer.state.log_history[0]["loss" if name == "total" else name] == pytest.approx(value, rel=1e-4), name
    changed = [
        name for name, value in trainer.model.named_parameters() if value.requires_grad and value.abs().sum() > 0
    ]
    assert any("lora_B" in name for name in changed)
    assert trainer.evaluate()["eval_logits"] > 0

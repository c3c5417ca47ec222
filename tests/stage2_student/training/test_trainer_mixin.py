"""The mixin in `transformers.Trainer` and in TRL's: a step is one of `train()`, and the log has each term."""

import itertools
import json
import pickle

import pytest
import torch
import transformers
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from tiny_cache import make_teacher
from torch.utils.data import Subset, random_split

import vlm_distill_cache as vdc
from vlm_distill_cache.data import builtin
from vlm_distill_cache.data.text.processors import tokenizer_fingerprint
from vlm_distill_cache.stage2_student.training.trainer_mixin import _changed_setting

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


def test_an_evaluations_loss_is_what_compute_loss_says(dataset, tmp_path):
    def extra(batch):
        return batch.labels.float().mean() / 50  # a mean over supervised rows

    class Adds(Trainer):
        def compute_loss(self, model, inputs, *args, **options):
            return super().compute_loss(model, inputs, *args, **options) + extra(inputs["distillation"])

    class Twice(Trainer):
        def compute_loss(self, model, inputs, *args, **options):
            return sum(super(Twice, self).compute_loss(model, inputs, *args, **options) for _ in range(2))

    class Replaces(Trainer):
        def compute_loss(self, model, inputs, *args, **options):
            return extra(inputs["distillation"])

    arguments = transformers.TrainingArguments(**options(tmp_path / "run", per_device_eval_batch_size=6))
    whole = dataset.collate([dataset[place] for place in range(len(dataset))])
    plain = Trainer(args=arguments, eval_dataset=dataset).evaluate()  # without anything to train on
    added = extra(whole).item()
    assert added > 0.5
    for kind, expected in ((Adds, plain["eval_loss"] + added), (Twice, 2 * plain["eval_loss"]), (Replaces, added)):
        found = kind(args=arguments, eval_dataset=dataset).evaluate()
        assert found["eval_loss"] == pytest.approx(expected, rel=1e-4), kind
        for name in ("eval_lm", "eval_visual_columns") if kind is not Replaces else ():
            assert found[name] == pytest.approx(plain[name], rel=1e-6), name


def test_parts_of_a_data_set_are_trained_and_evaluated_on_as_they_are(dataset, tmp_path):
    part, held_out = random_split(dataset, [13, 7], torch.Generator().manual_seed(1))
    part = Subset(part, range(1, 12))  # a part of a part
    places = [part.dataset.indices[index] for index in range(1, 12)]
    arguments = transformers.TrainingArguments(
        **options(tmp_path / "run", per_device_train_batch_size=3, gradient_accumulation_steps=4, max_steps=1),
        data_seed=0,
    )
    loss = vdc.DistillationLoss(dataset)
    trainer = Trainer(args=arguments, train_dataset=part, eval_dataset=held_out)

    def reference(positions):
        dataset.student.eval()
        with torch.no_grad():
            return named(loss(dataset.student, dataset.collate([dataset[position] for position in positions])))

    trained, evaluated = reference(places), reference(held_out.indices)
    assert trainer.evaluate()["eval_logits"] == pytest.approx(evaluated["logits"], rel=1e-4)
    trainer.train()
    for name in ("lm", "logits", "visual_columns"):
        assert trainer.state.log_history[-2][name] == pytest.approx(trained[name], rel=1e-4), name
    other = Trainer(args=arguments, train_dataset=held_out)
    assert other._learns_from["data set"] != trainer._learns_from["data set"]
    # Of one seed the order is the data set's own where the part is all of it: a seed of 0 is a seed.
    order = list(dataset.sampler(seed=0, window=1))
    assert list(dataset.sampler(seed=0, window=1, positions=range(20))) == order
    assert list(Trainer(args=arguments, train_dataset=dataset)._get_train_sampler()) == list(dataset.sampler(seed=0))
    # A shard's samples stand together, also where positions come in any order and twice.
    mixed = [*held_out.indices, held_out.indices[0]]
    found = list(dataset.sampler(seed=4, window=1, positions=mixed))
    assert sorted(found) == list(range(len(mixed)))
    shard_of = {place: number for number, shard in enumerate(dataset._joined.shards) for place in shard.tolist()}
    shards = [shard_of[mixed[position]] for position in found]
    assert len([one for one, _ in itertools.groupby(shards)]) == len(set(shards)) > 1


def test_a_wrong_data_set_is_refused(dataset, tiny_cache, student, tmp_path):
    arguments = transformers.TrainingArguments(**options(tmp_path / "run"))
    for indices in ([20], [0.5]):
        with pytest.raises(vdc.ConfigError, match=r"of 20 samples; expected positions of some"):
            Trainer(args=arguments, train_dataset=Subset(dataset, indices))
    with pytest.raises(vdc.ConfigError, match=r"model is 'no/folder'; expected a model that is loaded"):
        Trainer("no/folder", arguments, train_dataset=dataset)
    for wrong in ({"train_dataset": [1, 2]}, {"train_dataset": dataset, "eval_dataset": [1]}, {}):
        with pytest.raises(vdc.ConfigError, match=r"expected vlm_distill_cache\.DistillationDataset"):
            Trainer(args=arguments, **wrong)
    other = vdc.DistillationDataset(tiny_cache[0], student, vdc.LossWeights(logits=2.0), data=DATA)
    with pytest.raises(
        vdc.ConfigError, match=r"do not fit each other: losses .*logits.: 2.0.*; expected .*visual_columns"
    ):
        Trainer(args=arguments, train_dataset=dataset, eval_dataset=other)


def test_a_resumed_training_ends_as_one_without_a_break_and_the_best_model_is_that_of_its_checkpoint(
    student, tiny_cache, tmp_path
):
    dataset = vdc.DistillationDataset(tiny_cache[0], student, LOSSES, data=DATA, limit=9)
    saving = {
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "seed": 3,
    }
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.3}

    def trainer(folder, data=dataset, **others):
        data.student.load_state_dict(first)
        arguments = transformers.TrainingArguments(**options(tmp_path / folder, max_steps=4, **saving | others))
        return Trainer(args=arguments, train_dataset=data, eval_dataset=data)

    first = {name: value.clone() for name, value in dataset.student.state_dict().items()}
    trainer("whole").train()
    whole = weights_of(dataset.student)
    assert sum(not torch.equal(whole[name], first[name]) for name in whole) > 20
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in weights_of(dataset.student).items():
        torch.testing.assert_close(value, whole[name], atol=0, rtol=0, msg=name)
    begun = vdc.DistillationDataset(tiny_cache[0], tmp_path / "whole" / "checkpoint-4", LOSSES, data=DATA)
    assert all(torch.equal(value, whole[name]) for name, value in weights_of(begun.student).items())
    worse = trainer("worse", **best)  # so large a rate that the first evaluation is not the worst
    worse.train()
    assert worse.evaluate()["eval_loss"] == pytest.approx(worse.state.best_metric, rel=1e-5)

    for losses, data, words in (
        (LOSSES, 5, "data set"),
        (vdc.LossWeights(logits=2.0), None, "losses"),
    ):
        if words == "losses":  # the name of old
            (tmp_path / "whole/checkpoint-2/learnt_from.json").rename(tmp_path / "whole/checkpoint-2/distillation.json")
        other = vdc.DistillationDataset(tiny_cache[0], student, losses, data=DATA, limit=data)
        with pytest.raises(
            vdc.ConfigError, match=rf"(?s)checkpoint-2 is of a training whose {words} was .*begin anew from its weights"
        ):
            trainer("other", other).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    weights = tmp_path / "whole" / "checkpoint-4" / "model.safetensors"
    held = load_file(weights)
    save_file(dict(list(held.items())[1:]), weights, metadata={"format": "pt"})
    with pytest.raises(vdc.ModelError, match="1 of its weights are not this model's"):
        trainer("other").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")  # peft says that it does
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it by its name of old
def test_a_checkpoint_of_other_adapters_or_trained_parameters_is_not_resumed(dataset, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, saving = dataset.student, {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}

    def train(run, student, folder=None, steps=1):
        arguments = transformers.TrainingArguments(**options(tmp_path / run, **saving, max_steps=steps))
        Trainer(student, arguments, train_dataset=dataset).train(resume_from_checkpoint=folder)

    train("whole", model)
    model.lm_head.requires_grad_(False)
    with pytest.raises(vdc.ConfigError, match=r"not of the parameters that are trained now.*train the same"):
        train("whole", model, str(tmp_path / "whole" / "checkpoint-1"), 2)
    query = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["multi_modal_projector"]}
    for settings, refused in (
        ({}, None),  # written
        ({}, None),  # peft saves the weights below lm_head's adapter, too
        ({"target_modules": ["k_proj", "lm_head"]}, r"adapter_model.safetensors: \d+ of its tensors .*k_proj.*absent"),
        ({"lora_alpha": 32}, r"adapter_config.json: lora_alpha was 8 when the adapters were written, and is 32 now"),
        ({"modules_to_save": None}, r"adapter_config.json: modules_to_save was|\d+ of its tensors"),
    ):
        adapted = get_peft_model(model, LoraConfig(r=2, **query | settings))
        written = tmp_path / "query" / "checkpoint-1"
        if refused is None:
            train("query", adapted, str(written) if written.exists() else None, 2 if written.exists() else 1)
        else:
            with pytest.raises(vdc.ModelError, match=refused):
                train("other", adapted, str(written), 2)
        model = adapted.unload()


def test_settings_of_adapters_are_the_same_whatever_version_of_peft_wrote_them(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["b", "a"], lora_dropout=0.5)
    config.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    older = {
        name: value for name, value in stored.items() if name not in ("use_dora", "use_rslora", "layer_replication")
    }
    newer = stored | {"group": 16, "new": None, "is_new": False, "modules_to_save": ["a", "b"], "lora_dropout": 0.0}
    moved = stored | {"inference_mode": True, "base_model_name_or_path": "elsewhere", "target_modules": "(q|v)_proj"}
    assert [_changed_setting(one, config) for one in (stored, older, newer, moved)] == [None] * 4
    for name, value in {
        "is_new": True,
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 3},
        "r": 4,
        "bias": "all",
    }.items():
        assert name in _changed_setting(stored | {name: value}, config)
    assert "use_dora" in _changed_setting(older, LoraConfig(**stored | {"use_dora": True, "lora_dropout": 0.5}))


def test_an_evaluation_counts_its_own_batches_alone(dataset, student, tiny_cache, tmp_path):
    held_out = vdc.DistillationDataset(tiny_cache[0], student, LOSSES, data=DATA, limit=5)
    trainer = Trainer(
        args=transformers.TrainingArguments(**options(tmp_path / "run")), train_dataset=dataset, eval_dataset=held_out
    )
    first = trainer.evaluate()
    predicted = trainer.predict(dataset).metrics
    assert predicted["test_logits"] == pytest.approx(trainer.evaluate(dataset)["eval_logits"], rel=1e-6)
    with pytest.raises(vdc.ConfigError, match="train and evaluate on a DistillationDataset"):
        trainer.evaluate([*held_out, 7])
    again = trainer.evaluate()
    for name in ("loss", "lm", "logits", "visual_columns"):
        assert again[f"eval_{name}"] == first[f"eval_{name}"], name


def test_an_evaluation_before_the_training_of_several_processes_leaves_the_gradients_joined(
    dataset, tmp_path, monkeypatch
):
    class Joined(torch.nn.Module):
        def __init__(self, module, **_):
            super().__init__()
            self.module = module

        def forward(self, *args, **options):
            return self.module(*args, **options)

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Joined)
    arguments = transformers.TrainingArguments(**options(tmp_path / "run", max_steps=1, per_device_train_batch_size=2))
    trainer = Trainer(args=arguments, train_dataset=Subset(dataset, [0, 1]), eval_dataset=Subset(dataset, [2]))
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.MULTI_CPU)
    for _ in range(2):
        trainer.evaluate()
        trainer.train()
        assert isinstance(trainer.model_wrapped, Joined)
        assert trainer.model_wrapped.module is trainer.model is dataset.student


def test_what_has_no_effect_or_trains_something_else_is_refused(dataset, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    arguments = transformers.TrainingArguments(**options(tmp_path / "run"))
    for name in (
        "compute_metrics",
        "compute_loss_func",
        "data_collator",
        "model_init",
        "preprocess_logits_for_metrics",
    ):
        with pytest.raises(vdc.ConfigError, match=f"{name}= is given, which cannot be used"):
            Trainer(args=arguments, train_dataset=dataset, **{name: dataset.collate})
    changed = {
        "label_smoothing_factor": 0.1,
        "train_sampling_strategy": "sequential",
        "include_num_input_tokens_seen": "all",
        "accelerator_config": {"dispatch_batches": True},
    }
    for name, value in changed.items():
        named = "dispatch_batches is True" if isinstance(value, dict) else f"{name} is {value!r}"
        with pytest.raises(vdc.ConfigError, match=f"{named} in args"):
            Trainer(
                args=transformers.TrainingArguments(**options(tmp_path / "run", **{name: value})), train_dataset=dataset
            )
    generates = transformers.Seq2SeqTrainingArguments(**options(tmp_path / "run"), predict_with_generate=True)
    with pytest.raises(vdc.ConfigError, match=r"predict_with_generate is True in args.*generates nothing"):
        type("Seq2Seq", (vdc.DistillationTrainerMixin, transformers.Seq2SeqTrainer), {})(
            args=generates, train_dataset=dataset
        )
    with pytest.raises(vdc.ConfigError, match=r"Trainer stands before .*Mixed\(DistillationTrainerMixin, Trainer\)"):
        type("Mixed", (transformers.Trainer, vdc.DistillationTrainerMixin), {})
    with pytest.raises(vdc.ConfigError, match="no trainer among its bases"):
        vdc.DistillationTrainerMixin(args=arguments, train_dataset=dataset)
    with pytest.raises(vdc.ConfigError, match="holds no model"):
        Trainer(args=arguments, train_dataset=pickle.loads(pickle.dumps(dataset)))  # noqa: S301 - ours
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), dataset.student)
    Trainer(args=arguments, train_dataset=dataset)  # saves nothing on the way
    arguments.save_strategy = "steps"
    with pytest.raises(vdc.ModelError, match="give model= what get_peft_model returned"):
        Trainer(args=arguments, train_dataset=dataset)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL and peft, by its name of old
def test_trl_takes_the_same_step_in_adapters(dataset, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")

    from peft import LoraConfig

    class SFTTrainer(vdc.DistillationTrainerMixin, trl.SFTTrainer):
        pass

    class Preferences(vdc.DistillationTrainerMixin, trl.DPOTrainer):
        pass

    asked = tokenizer_fingerprint(dataset.tokenizer)
    for name in ("eos_token", "pad_token", "chat_template_path"):
        arguments = trl.SFTConfig(**options(tmp_path / "run", bf16=False))
        setattr(arguments, name, "<unk>")  # of the constructor TRL warns
        with pytest.raises(vdc.ConfigError, match=f"{name} is '<unk>' in args.*tokenizer and template are those"):
            SFTTrainer(args=arguments, train_dataset=dataset)
    arguments = trl.SFTConfig(**options(tmp_path / "run", bf16=False))
    with pytest.raises(vdc.ConfigError, match=r"trl\.DPOTrainer trains in a way of its own"):
        Preferences(args=arguments, train_dataset=dataset)
    with pytest.raises(vdc.ConfigError, match=r"train_dataset is None"):
        SFTTrainer(args=arguments, eval_dataset=dataset)

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
    assert trainer.processing_class is not dataset.tokenizer  # TRL changes its own
    assert tokenizer_fingerprint(dataset.tokenizer) == asked

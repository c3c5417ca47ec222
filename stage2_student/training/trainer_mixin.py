"""The losses of a cache in `transformers.Trainer`, or a trainer derived from it."""

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from vlm_distill_cache.common.cache.other_folders import STUDENT
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import read_json, write_json_atomic
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.files.rules import OBJECT, check, entries, text
from vlm_distill_cache.common.files.tensor_table import read_tensor_table
from vlm_distill_cache.common.printing import brief
from vlm_distill_cache.stage2_student.batches.batch import TrainingSample
from vlm_distill_cache.stage2_student.losses.objective import units_of
from vlm_distill_cache.stage2_student.losses.terms import TERMS
from vlm_distill_cache.stage2_student.training.distillation import (
    DistillationDataset,
    DistillationLoss,
    has_adapters,
    refuse_other,
    unwrapped,
)

BATCH, SHARE, ROW = "distillation", "share", ("dataset", "position")
ADDED = "added"  # to the losses, by a trainer's own compute_loss
LEARNT_FROM = "learnt_from.json"  # in a checkpoint
_AS_OF_OLD = STUDENT  # its name before, which made a damaged student of each checkpoint
_LOSSES = "the losses are those of LossWeights"
_NOT_OURS = {
    "compute_metrics": "logits are never whole, and metrics are the losses' means",
    "preprocess_logits_for_metrics": "logits are never whole",
    "compute_loss_func": _LOSSES,
    "data_collator": "DistillationDataset.collate is used",
    "model_init": "the model is the data set's student, or model=",
}
_ORDER = "DistillationDataset.sampler says the order"
_SEQUENCES = "sequences, and the tokens that are supervised, are those that the teacher saw"
_TOKENS = "tokenizer and template are those of the data set, which agree with the teacher's"
_WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), _LOSSES),
    "train_sampling_strategy": (("random",), _ORDER),
    "group_by_length": ((False,), _ORDER),
    "include_num_input_tokens_seen": (("no", False), "batches hold more than token ids, and are not counted"),
    "packing": ((False,), _SEQUENCES),
    "eval_packing": ((None, False), _SEQUENCES),
    "padding_free": ((False,), _SEQUENCES),
    "assistant_only_loss": ((False,), _SEQUENCES),
    "eos_token": ((None,), _TOKENS),
    "pad_token": ((None,), _TOKENS),
    "chat_template_path": ((None,), _TOKENS),
    "predict_with_generate": ((False,), "an evaluation computes the losses, and generates nothing"),
    "dispatch_batches": ((None, False), "batches are no tensors that one process could cut up for the others"),
}


# Settings of an adapter that no function depends on, or that its tensors' names tell: a list and a pattern say the same.
_NO_FUNCTION = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    )
) | {"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"}


class DistillationTrainerMixin:
    """Stands before a trainer among the bases of a class, and gives it loss, collator, shuffle and log.

    As here::

        class DistillationTrainer(vdc.DistillationTrainerMixin, transformers.Trainer):
            pass

        trainer = DistillationTrainer(args=arguments, train_dataset=dataset, eval_dataset=held_out)

    Data sets are each a `DistillationDataset`; the model is the training set's student unless one is given, such as that
    student in a peft wrapper. Gradient accumulation and processes do not change the gradient of a step. Each term is logged
    under its own name, as ``eval_`` and its name in an evaluation, where all are means over the whole data set (of several
    processes with the samples that accelerate fills last batches up with). For trainers of TRL, which take their own data sets
    only, data sets are handed over as rows of positions.
    """

    loss_is_scaled_for_ga = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        before = cls.__mro__[: cls.__mro__.index(DistillationTrainerMixin)]
        if trainer := next((base for base in before if base.__module__.startswith(("transformers.", "trl."))), None):
            raise ConfigError(
                f"class {cls.__name__}: {trainer.__name__} stands before DistillationTrainerMixin and would train without it; "
                f"write class {cls.__name__}(DistillationTrainerMixin, {trainer.__name__})"
            )

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **others: Any,
    ) -> None:
        """Take a trainer's arguments.

        Raises:
            ConfigError: If a data set is no `DistillationDataset` nor part of one, the two have other losses or are for
                other students, or an argument asks for what cannot be used here.
            ModelError: If the model is of another kind than the training set's student, or has adapters without peft's
                wrapper.
        """
        _refuse_arguments(self, args, others)
        held_out = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
        given = [dataset for dataset in (train_dataset, *held_out.values()) if dataset is not None]
        if not given or (_is_trl(self) and train_dataset is None):
            raise ConfigError(
                "train_dataset is None; expected vlm_distill_cache.DistillationDataset (transformers.Trainer evaluates "
                "without one, if there is an eval_dataset)"
            )
        parts = [_part(dataset) for dataset in given]
        datasets = [dataset for dataset, _ in parts]
        self._data, positions = parts[0]
        for dataset in datasets:
            refuse_other(dataset.made_for, self._data.made_for, "train_dataset and eval_dataset do not fit each other")
        self.distillation = DistillationLoss(self._data)
        model = self._data.student if model is None else model
        if model is None:
            raise ConfigError("the data set is a copy, which holds no model; give model=")
        if not isinstance(model, nn.Module) and not _is_trl(self):  # TRL loads a model by its name
            raise ConfigError(
                f"model is {brief(repr(model))}; expected a model that is loaded, or none: the data set's student is used "
                "then, which DistillationDataset(..., student=) takes by its folder or name"
            )
        if isinstance(model, nn.Module):
            self.distillation.base_of(model)
            saves = args is None or args.save_strategy != "no"
            if saves and has_adapters(model) and not hasattr(unwrapped(model, keep_adapters=True), "get_base_model"):
                raise ModelError(
                    f"the model is a {type(model).__name__} with peft's adapters inside, of which no checkpoint could be resumed; "
                    "give model= what get_peft_model returned, or set save_strategy='no'"
                )
        self._sums: dict[bool, dict[str, Any]] = {True: defaultdict(float), False: defaultdict(float)}
        self._steps = 0
        self._computed: list[torch.Tensor] = []
        seed = 0 if args is None else args.seed if args.data_seed is None else args.data_seed
        self._sampler = self._data.sampler(seed=seed, positions=positions)
        self._learns_from = self._data.made_for | {
            "data set": self._data.fingerprint
            if positions is None
            else fingerprint([self._data.fingerprint, positions])
        }
        if _is_trl(self):
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
            rows = {id(dataset): _rows(number, *parts[number]) for number, dataset in enumerate(given)}
            train_dataset = rows[id(train_dataset)]
            if isinstance(eval_dataset, Mapping):
                eval_dataset = {name: rows[id(dataset)] for name, dataset in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = rows[id(eval_dataset)]
        if args is not None:
            args.remove_unused_columns = False
        others["data_collator"] = _Collator(datasets)
        # A copy, since TRL changes it.
        others["processing_class"] = copy.deepcopy(others.get("processing_class") or self._data.tokenizer)
        trainer: Any = super()
        trainer.__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **others,
        )
        self.model_accepts_loss_kwargs = True  # older versions read this for `loss_is_scaled_for_ga`

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return self._sampler

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, each with its share of it."""
        found = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        shares = self.distillation.shares([batch[BATCH] for batch in found], self.accelerator) if found else []  # type: ignore[attr-defined]
        for batch, share in zip(found, shares, strict=True):
            batch[SHARE] = share
        self._steps += bool(found)
        return found, torch.tensor(1, device=device)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the losses on a micro-batch."""
        batch, share = inputs[BATCH], inputs.get(SHARE)
        losses = self.distillation(model, batch, share)
        training = share is not None
        counts = dict(zip(("lm", *TERMS), units_of(batch), strict=True))
        for name, value in ({**losses.terms, **losses.measures} if training else losses.terms).items():
            # Shares add up to a step's means; of an evaluation each is weighted by what it is a mean over.
            sums, count = self._sums[training], 1 if training else counts[name]
            sums[name] = sums[name] + value.detach().float() * count
            sums[f"{name}/count"] += count
        if not training:
            self._computed.append(losses.total.detach())
        return (losses.total, {}) if return_outputs else losses.total

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, None, None]:
        """The loss on a batch that is held out; logits are never whole, so there are none."""
        self._computed = []
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs)).detach()  # type: ignore[attr-defined]
        # What a class of the user's own made of the loss, which is no mean over units that are known here.
        own = loss - sum(self._computed) / max(1, len(self._computed))
        rows = inputs[BATCH].row_count
        self._sums[False][ADDED] += own.float() * rows
        self._sums[False][f"{ADDED}/count"] += rows
        return loss, None, None

    def train(self, *args: Any, **options: Any) -> Any:
        """Train, from what is in no other training's sums."""
        self._steps = 0
        self._sums[True].clear()
        trainer: Any = self
        if trainer.accelerator.distributed_type.value.startswith("MULTI_") and trainer.model_wrapped is trainer.model:
            # An evaluation before has prepared the model without DDP, which would then be left out of the training, too.
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            trainer.model._is_accelerate_prepared = False
        return super().train(*args, **options)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Evaluate or predict, with each term's mean over the whole data set among the metrics."""
        self._sums[False].clear()
        output = super().evaluation_loop(*args, **options)  # type: ignore[misc]
        prefix = next((key.removesuffix("loss") for key in output.metrics if key.endswith("_loss")), None)
        terms = self._means(training=False)
        if prefix is not None and ADDED in terms:
            weighted = (weight * terms.get(name, 0.0) for name, weight in self.distillation.weights.items())
            terms["loss"] = terms.pop(ADDED) + sum(weighted)
            output.metrics.update({f"{prefix}{name}": value for name, value in terms.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log, with each term of a step."""
        if "loss" in logs:
            logs |= self._means(training=True)
        super().log(logs, *args, **options)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = self
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        folder = Path(trainer._get_output_dir(trial)) / f"checkpoint-{trainer.state.global_step}"
        if trainer.args.should_save and folder.is_dir():
            write_json_atomic(folder / LEARNT_FROM, self._learns_from)
            (folder / _AS_OF_OLD).unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        told = next((file for name in (LEARNT_FROM, _AS_OF_OLD) if (file := folder / name).exists()), None)
        if told is not None:  # else it was written before there was one
            stored = check(read_json(told), entries(text(1 << 16), most=32), str(told), remedy="resume another one")
            anew = "DistillationDataset(..., student=CHECKPOINT)"
            if not (folder / "config.json").exists():  # adapters alone
                anew = "model=peft.PeftModel.from_pretrained(dataset.student, CHECKPOINT, is_trainable=True)"
            for name, value in self._learns_from.items():
                if stored.get(name) != value:
                    raise ConfigError(
                        f"{folder} is of a training whose {name} was {brief(str(stored.get(name)))}; it is now {brief(value)}. "
                        f"Resume it with the same data set and losses, or begin anew from its weights: {anew}"
                    )
        if not self._load_weights(folder):
            trainer: Any = self
            _refuse_other_adapters(folder, trainer.accelerator.unwrap_model(trainer.model))
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        except ValueError as error:
            raise ConfigError(
                f"{checkpoint}: its optimizer's state is not of the parameters that are trained now ({error}); train the same "
                "ones (requires_grad, adapters) with the same optim, or begin anew from its weights"
            ) from error

    def _load_best_model(self) -> None:
        trainer: Any = self
        if not self._load_weights(Path(trainer.state.best_model_checkpoint)):
            super()._load_best_model()  # type: ignore[misc]

    def _load_weights(self, folder: Path) -> bool:
        """Read a whole model's weights under the names that the library gives them when it loads; False: adapters alone."""
        trainer: Any = self
        model = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(model, "get_base_model"):
            return False
        if not (folder / "config.json").exists():
            raise ModelError(
                f"{folder} holds no whole model; resume a checkpoint that this trainer wrote of the same model"
            )
        dtype = reduce(torch.promote_types, {part.dtype for part in model.parameters() if part.is_floating_point()})
        loaded, said = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
        if wrong := [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in said[kind]]:
            raise ModelError(
                f"{folder}: {len(wrong)} of its weights are not this model's, such as {wrong[0]}; resume a checkpoint that this "
                "trainer wrote of the same model"
            )
        model.load_state_dict(loaded.state_dict())
        return True

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As the trainer; a model without adapters with all that it reads with."""
        trainer: Any = self
        folder, model = Path(output_dir or trainer.args.output_dir), trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(model, "get_base_model"):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        else:
            self._data.save_student(folder, model)
            torch.save(trainer.args, folder / "training_args.bin")

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """As the trainer counts them, from the tokens of a batch."""
        tokens: int = inputs[BATCH].inputs.input_ids.numel()
        return 6 * tokens * sum(parameter.numel() for parameter in self.model.parameters())  # type: ignore[attr-defined]

    def _means(self, *, training: bool) -> dict[str, float]:
        """Each term since this was last asked, over all processes; raises nothing where there was no batch."""
        sums, self._sums[training] = self._sums[training], defaultdict(float)
        if not sums:
            return {}
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        local = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64)
        if accelerator.num_processes > 1:
            local = accelerator.reduce(local.to(accelerator.device), reduction="sum")
        found = dict(zip(sums, local.tolist(), strict=True))
        scale = accelerator.num_processes * accelerator.gradient_accumulation_steps * max(1, self._steps)
        if training:
            self._steps = 0
        names = [name for name in found if not name.endswith("/count")]
        return {name: found[name] / (scale if training else max(1.0, found[f"{name}/count"])) for name in names}


def _is_trl(trainer: Any) -> bool:
    return any(base.__module__.startswith("trl.") for base in type(trainer).__mro__)


def _part(dataset: Any) -> tuple[DistillationDataset, list[int] | None]:
    """A data set and None, or the one that a `Subset` is of, and the positions that it takes of it."""
    if not isinstance(dataset, Subset):
        if not isinstance(dataset, DistillationDataset):
            raise ConfigError(
                f"train_dataset or eval_dataset is {type(dataset).__name__}; expected "
                "vlm_distill_cache.DistillationDataset, or a part of one (torch.utils.data.random_split, Subset)"
            )
        return dataset, None
    whole, chosen = _part(dataset.dataset)
    within = range(len(whole)) if chosen is None else chosen
    try:
        return whole, [within[position] for position in dataset.indices]
    except (IndexError, TypeError) as error:
        raise ConfigError(
            f"a Subset takes {brief(repr(dataset.indices))} of {len(within)} samples; expected positions of some of them"
        ) from error


def _refuse_arguments(trainer: Any, args: Any, others: Mapping[str, Any]) -> None:
    """Refuse what would have no effect, or break off deep inside."""
    if not hasattr(trainer, "training_step"):
        raise ConfigError(
            f"class {type(trainer).__name__} has no trainer among its bases; add transformers.Trainer, last"
        )
    if _is_trl(trainer):
        base = next(base for base in type(trainer).__mro__ if base.__module__.startswith("trl."))
        if base.__name__ != "SFTTrainer":
            raise ConfigError(
                f"trl.{base.__name__} trains in a way of its own, which the losses of a cache have no place in; derive from "
                "trl.SFTTrainer or transformers.Trainer"
            )
        if not hasattr(args, "dataset_kwargs"):
            raise ConfigError(f"args is {type(args).__name__}; expected trl.SFTConfig")
    for name in _NOT_OURS:
        if others.get(name) is not None:
            raise ConfigError(f"{name}= is given, which cannot be used here: {_NOT_OURS[name]}; leave it out")
    for name, (usual, why) in _WITHOUT_EFFECT.items():
        accelerates = getattr(args, "accelerator_config", None)
        if (value := getattr(args, name, getattr(accelerates, name, usual[0]))) not in usual:
            raise ConfigError(
                f"{name} is {value!r} in args, which cannot be used here: {why}; leave it at {usual[0]!r}"
            )


class _Collator:
    """Samples, or rows that say where samples are, as what a trainer hands on."""

    def __init__(self, datasets: Sequence[DistillationDataset]) -> None:
        self._datasets = list(datasets)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        for one in samples:
            if not isinstance(one, TrainingSample) and not (isinstance(one, Mapping) and one.keys() == {*ROW}):
                raise ConfigError(f"a sample is {brief(repr(one))}; train and evaluate on a DistillationDataset")
        made = [one if isinstance(one, TrainingSample) else self._datasets[one[ROW[0]]][one[ROW[1]]] for one in samples]
        return {BATCH: self._datasets[0].collate(made)}


def _refuse_other_adapters(folder: Path, model: Any) -> None:
    """Refuse a checkpoint of other adapters, of which peft would load what fits, and leave the rest as it is."""
    from peft import get_peft_model_state_dict

    for name in model.active_adapters[:1]:  # the trainer loads the first alone
        inside = folder / name if (folder / name).is_dir() else folder
        file, settings = inside / "adapter_model.safetensors", inside / "adapter_config.json"
        for path in (file, settings):
            if not path.is_file():
                raise ModelError(
                    f"{path} is not there; resume a checkpoint that this trainer wrote of the same adapters"
                )
        found = read_tensor_table(file)
        adapter, every = (
            get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=saved) for saved in (False, True)
        )
        # peft may save the model's own embeddings beside an adapter, or not.
        expected = {key: tuple(value.shape) for key, value in every.items() if key in adapter or key in found}
        remedy = "give the model the adapters that were trained, or begin anew"
        if wrong := [key for key in {**expected, **found} if expected.get(key) != found.get(key)]:
            raise ModelError(
                f"{file}: {len(wrong)} of its tensors are not those of the model's adapters, such as {wrong[0]} "
                f"({found.get(wrong[0], 'absent')}, expected {expected.get(wrong[0], 'none')}); {remedy}"
            )
        stored = check(read_json(settings), OBJECT, str(settings), remedy="resume another one")
        if changed := _changed_setting(stored, model.peft_config[name]):
            raise ModelError(f"{settings}: {changed}; {remedy}")


def _changed_setting(stored: Mapping[str, Any], config: Any) -> str | None:
    """The first setting that makes another function of the same tensors, and what it was and is; None: there is none.

    What the file lacks is at its default: an older version of peft had no such setting. What this version lacks was without
    effect where it is empty, or a number, which belongs to another setting.
    """
    current = config.to_dict()
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(config)
    }
    for key in sorted({*stored, *current} - _NO_FUNCTION):
        was, now = stored.get(key, defaults.get(key)), current.get(key)
        unknown = key not in current and (not was or type(was) in (int, float))
        if not unknown and not key.endswith("dropout") and _as_json(was) != _as_json(now):
            return f"{key} was {brief(str(_as_json(was)))} when the adapters were written, and is {brief(str(_as_json(now)))} now"
    return None


def _as_json(value: Any) -> Any:
    """A setting as JSON keeps it, names in one order."""
    kept = json.loads(json.dumps(value, default=lambda other: list(other) if isinstance(other, set) else str(other)))
    return sorted(kept) if isinstance(kept, list) and all(isinstance(one, str) for one in kept) else kept


def _rows(number: int, dataset: DistillationDataset, positions: list[int] | None) -> Any:
    """Positions in a data set as a `datasets.Dataset`."""
    import datasets

    places = list(range(len(dataset))) if positions is None else positions
    return datasets.Dataset.from_dict(dict(zip(ROW, ([number] * len(places), places), strict=True)))

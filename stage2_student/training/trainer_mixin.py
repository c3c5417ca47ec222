"""The losses of a cache in `transformers.Trainer`, or a trainer derived from it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.stage2_student.batches.batch import TrainingSample
from vlm_distill_cache.stage2_student.losses.objective import units_of
from vlm_distill_cache.stage2_student.losses.terms import TERMS
from vlm_distill_cache.stage2_student.training.distillation import DistillationDataset, DistillationLoss

BATCH, SHARE = "distillation", "share"


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

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        train_dataset: DistillationDataset | None = None,
        eval_dataset: Any = None,
        **others: Any,
    ) -> None:
        """Take a trainer's arguments.

        Raises:
            ConfigError: If a data set is no `DistillationDataset`, or the two have other losses.
        """
        held_out = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
        given = [train_dataset, *(dataset for dataset in held_out.values() if dataset is not None)]
        if wrong := [dataset for dataset in given if not isinstance(dataset, DistillationDataset)]:
            raise ConfigError(
                f"train_dataset or eval_dataset is {type(wrong[0]).__name__}; expected vlm_distill_cache.DistillationDataset"
            )
        datasets: list[Any] = given
        if any(dataset.objective != datasets[0].objective for dataset in datasets):
            raise ConfigError(
                "train_dataset and eval_dataset have other losses, or caches of other layers: give both the same losses, and "
                "caches that were built with the same options"
            )
        self.distillation = DistillationLoss(datasets[0])
        self._sums: dict[bool, dict[str, Any]] = {True: defaultdict(float), False: defaultdict(float)}
        self._steps, self._data = 0, datasets[0]
        self._sampler = datasets[0].sampler(seed=0 if args is None else args.data_seed or args.seed)
        if any(base.__module__.startswith("trl.") for base in type(self).__mro__):
            rows = {id(dataset): _rows(number, len(dataset)) for number, dataset in enumerate(datasets)}
            train_dataset = rows[id(train_dataset)]
            if isinstance(eval_dataset, Mapping):
                eval_dataset = {name: rows[id(dataset)] for name, dataset in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = rows[id(eval_dataset)]
        if args is not None:
            args.remove_unused_columns = False
        others.setdefault("data_collator", _Collator(datasets))
        others.setdefault("processing_class", datasets[0].tokenizer)
        trainer: Any = super()
        trainer.__init__(
            model=datasets[0].student if model is None else model,
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
        return (losses.total, {}) if return_outputs else losses.total

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, None, None]:
        """The loss on a batch that is held out; logits are never whole, so there are none."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log, with each term."""
        key = next((name for name in logs if name == "loss" or name.endswith("_loss")), None)
        if key is not None and key != "train_loss":
            prefix, training = key.removesuffix("loss"), key == "loss"
            terms = self._means(training=training)
            logs |= {f"{prefix}{name}": value for name, value in terms.items()}
            if not training and terms:
                weights = self.distillation.weights
                logs[key] = sum(weight * terms.get(name, 0.0) for name, weight in weights.items())
        super().log(logs, *args, **options)  # type: ignore[misc]

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


class _Collator:
    """Samples, or rows that say where samples are, as what a trainer hands on."""

    def __init__(self, datasets: Sequence[DistillationDataset]) -> None:
        self._datasets = list(datasets)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        made = [
            one if isinstance(one, TrainingSample) else self._datasets[one["dataset"]][one["position"]]
            for one in samples
        ]
        return {BATCH: self._datasets[0].collate(made)}


def _rows(number: int, count: int) -> Any:
    """Positions in a data set as a `datasets.Dataset`."""
    import datasets

    return datasets.Dataset.from_dict({"dataset": [number] * count, "position": list(range(count))})

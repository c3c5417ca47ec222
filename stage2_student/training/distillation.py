"""Data, cache, student and losses for somebody else's training loop: a torch `Dataset`, its collator, and one loss.

What `train()` checks before its first step is checked here when the data set is made, by the same code.

Dims: B batch, T sequence, A supervised rows.
"""

import copy
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from torch.utils.data._utils.collate import default_collate_fn_map
from transformers import PreTrainedModel

from vlm_distill_cache.common.attention.capture import AttentionCapture, checkpoint_recorded
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.common.errors import ConfigError, DataError, DistillError, ModelError, SampleNotCachedError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.common.printing import brief
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.text.processors import tokenizer_fingerprint
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch, TrainingSample
from vlm_distill_cache.stage2_student.batches.dataset import LiveTeacher
from vlm_distill_cache.stage2_student.batches.sampler import ShardShuffle
from vlm_distill_cache.stage2_student.config import TOKEN_OPTIONS, PhaseConfig, TrainConfig
from vlm_distill_cache.stage2_student.exports.folder import save_student_folder
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.objective import Losses, Shares, step_shares, units_of
from vlm_distill_cache.stage2_student.students.library import LibraryStudent
from vlm_distill_cache.stage2_student.students.parts import model_parts
from vlm_distill_cache.stage2_student.training.preparation import Preparation, prepare
from vlm_distill_cache.stage2_student.training.resolve import with_folders

_OPTIONS = ("template", "max_length", "limit", "data_share", "seed", "memory_gib", "verify", "shuffle_teacher_images")
_STUDENT_OPTIONS = (
    *("student_weights", "vision_tower", "language_model", "projector", "pool_teacher_tokens"),
    *(name for head, names in TOKEN_OPTIONS.items() for name in (head, *names)),
)
_WHOLE = (
    "no process holds it as a whole, as these losses need; start one process per device (`accelerate launch`) with DDP, and "
    "train adapters (peft) or use activation checkpointing if memory is short"
)
_UNUSABLE = {
    "FullyShardedDataParallel": _WHOLE,
    "DeepSpeedEngine": _WHOLE,
    "DataParallel": _WHOLE,
    "OptimizedModule": "what is recorded of a forward pass is lost in compiled code; give the model without torch.compile",
}


class DistillationDataset(Dataset[TrainingSample]):
    """Samples of a data set joined with what a teacher's cache holds of each, as one student reads them.

    A map-style data set: ``dataset[7]`` and ``dataset["sample-17"]`` are samples, ``collate`` makes a batch of some. It
    works in the worker processes of a `DataLoader`.

    Attributes:
        student: The model: the caller's, or loaded in float32 on the CPU with its vision tower frozen.
        tokenizer: The student's.
        image_processor: The student's.
        losses: The weights; only signals that one of them reads are decoded.
        cache: As it was given.
        sample_ids: In the cache's order.
        made_for: What a loss and a model must be to use its batches.
        fingerprint: Of caches, samples and prompts.
    """

    def __init__(
        self,
        cache: str | Path | TeacherCache,
        student: Any,
        losses: LossWeights | None = None,
        *,
        processor: Any = None,
        data: str | Path | None = None,
        images: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Open data, cache and student, and refuse what does not fit.

        Args:
            cache: A folder or address, or an open cache.
            student: A folder, a name on the hub or one of ours, or a model of the model library with its ``processor``.
            losses: None: the cross-entropy and the divergence from the cached logits.
            processor: Of a model: its checkpoint's folder or name on the hub, what `AutoProcessor.from_pretrained` gives, or
                tokenizer and image processor.
            data: What the cache was built from, as for stage one; None: the built-in data set that it names.
            images: Folder that relative image paths start from.
            options: Of `TrainConfig`: ``template``, ``max_length``, ``limit``, ``data_share``, ``seed``, ``memory_gib`` (0
                unless given; each worker process keeps its own), ``verify`` and ``shuffle_teacher_images``; of a student that
                is not given as a model, ``student_weights``, ``vision_tower``, ``language_model``, ``projector``,
                ``pool_teacher_tokens`` and all about visual tokens, too (docs/visual-tokens.md).

        Raises:
            DistillError: With the remedy, if they do not fit each other.
        """
        self.losses = LossWeights(lm=1.0, logits=1.0) if losses is None else losses
        self.cache = cache
        if not isinstance(self.losses, LossWeights):
            raise ConfigError(
                f"losses is {type(losses).__name__}; expected LossWeights, as LossWeights(lm=1.0, logits=1.0)"
            )
        is_model = isinstance(student, nn.Module)
        if not isinstance(cache, str | Path | TeacherCache):
            raise ConfigError(
                f"cache is {type(cache).__name__}; expected one folder or address, or what open_cache gives. For several, "
                "data= is a mixture whose entries have a cache each (docs/scale.md), and cache= one of them"
            )
        if is_model != (processor is not None):
            raise ConfigError(
                f"student is {type(student).__name__}, processor {type(processor).__name__}: a model needs the processor "
                "that it reads with (processor=DIR of its checkpoint, for one); a folder or a name brings its own"
            )
        known = _OPTIONS if is_model else (*_OPTIONS, *_STUDENT_OPTIONS)
        if unknown := [name for name in options if name not in known]:
            of = " of a model that is given" if is_model else ""
            raise ConfigError(f"DistillationDataset has no option {unknown[0]}{of}; options are {', '.join(known)}")
        phase = PhaseConfig(steps=1, losses=self.losses)
        place = cache.place if isinstance(cache, TeacherCache) else str(cache)
        named: dict[str, Any] = {
            "student": "given" if is_model else str(student),
            "data": data,
            "images": images,
            "cache": place,
        }
        with _python_words():
            values = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
            checked = config_from_dict(
                TrainConfig, {"output": "unused", "cache": place, **values}, where="DistillationDataset"
            )
            config = replace(
                checked,
                **named,
                phases=("dft",),
                dft=phase,
                memory_gib=checked.memory_gib if "memory_gib" in options else 0.0,
            )
            parts = model_parts(unwrapped(student), processor) if is_model else None
            prepared = prepare(config if is_model else with_folders(config), parts=parts)
        model: Any = prepared.student
        self._joined, self._encoder, self._source = prepared.phases[0].dataset, prepared.encoder, prepared.source
        self.student: Any = model.model if isinstance(model, LibraryStudent) else model
        self.made_for = _made_for(prepared, self.student)
        if is_model:
            self.student = unwrapped(student, keep_adapters=True)
        self.tokenizer, self.image_processor = prepared.tokenizer, prepared.image_processor
        self.objective, self._caches = prepared.phases[0].objective, list(prepared.caches.values())
        described = [
            sorted(prepared.cache_hashes.values()),
            len(self),
            len(self.sampler()),
            config.shuffle_teacher_images,
            *([config.data_share, config.seed] if config.data_share < 1 else []),
        ]
        self.fingerprint = fingerprint([described, prepared.encoder_description])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "student": None}  # worker processes need no model

    @property
    def sample_ids(self) -> Sequence[str]:
        """The ids, in the cache's order."""
        return self._joined.sample_ids

    def __len__(self) -> int:
        return len(self._joined)

    def __getitem__(self, which: int | str) -> TrainingSample:
        """Encode a sample and decode what the cache holds of it.

        Raises:
            SampleNotCachedError: If there is no sample of this id.
            CacheMismatchError: If its text or picture is not what the teacher saw.
            DataError: If ``which`` is neither a position nor an id.
        """
        return replace(self._joined.load(self._place(which)), made_for=self.made_for)

    def collate(self, samples: Sequence[TrainingSample]) -> TrainingBatch:
        """Join samples to a batch, which ``.to(device)`` moves: the `collate_fn` of a `DataLoader`.

        Raises:
            ConfigError: If they are none, or of a data set with other losses or for another student.
        """
        if not samples or not all(isinstance(sample, TrainingSample) for sample in samples):
            raise ConfigError(
                f"a batch is made of {brief(repr(list(samples)))}; expected samples of a DistillationDataset, one or more"
            )
        for sample in samples:
            refuse_other(
                sample.made_for,
                self.made_for,
                f"sample {sample.encoded.sample_id!r} is of a data set that this one does not fit",
            )
        return replace(self._joined.collate(samples), made_for=self.made_for)

    def live_batch(self, samples: Sequence[int | str], teacher: LiveTeacher) -> TrainingBatch:
        """The same batch with what a live teacher says now in place of the cache; the loss cannot tell the two apart.

        Args:
            samples: Positions or ids.
            teacher: A `vlm_distill_cache.LiveTeacher`, or any function from samples to what it gives.

        Raises:
            CacheMismatchError: If the teacher reads other words or pictures, or lacks a signal that a loss reads.
        """
        found = self._joined.live([self._place(sample) for sample in samples], teacher)
        return self.collate([replace(sample, made_for=self.made_for) for sample in found])

    def save_student(self, folder: str | Path, model: Any = None) -> None:
        """Write a trained model, and all that it reads with, where the model library finds them without this project, too.

        Args:
            folder: Made if it is not there; files of an earlier student of the same kind are replaced.
            model: Wrapped or not; None: the data set's student. Adapters inside it are added to the weights that are
                written; the model itself stays as it is.

        Raises:
            ConfigError: If something else lies there, or this copy of the data set holds no model.
            ModelError: If the model is of another kind than the student.
        """
        target, inner = Path(folder), self.student if model is None else model
        if inner is None:
            raise ConfigError(
                "this copy of a DistillationDataset holds no model, which copies leave behind; give model="
            )
        inner = unwrapped(inner)
        _refuse_foreign(target, inner)
        refuse_other({"student": _kind(inner)}, self.made_for, "the model is not of this data set")
        inner = _merged(inner)
        target.mkdir(parents=True, exist_ok=True)
        save_student_folder(
            target,
            model=inner if isinstance(inner, VisionLanguageModel) else _as_student(inner),
            encoder=self._encoder,
            image_processor=self.image_processor,
            source=self._source,
        )

    def sampler(self, *, seed: int = 0, window: int = 8, positions: Sequence[int] | None = None) -> "ShardSampler":
        """An order that shuffles shards, and samples inside each ``window`` of them, as `train()` reads: fast from disks.

        Args:
            positions: Of a `Subset` (its ``indices``), which the order is for; None: for all.

        Raises:
            ConfigError: If ``seed`` is no whole number from 0 on, or ``window`` none from 1 on.
        """
        for name, value, least in (("seed", seed, 0), ("window", window, 1)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"sampler: {name} is {value!r}; expected a whole number of {least} or more")
        shards, repeats = self._joined.shards, self._joined.repeats(seed)
        if positions is not None:
            owner = np.zeros(len(self), dtype=np.int64)
            for number, shard in enumerate(shards):
                owner[shard] = number
            owners = owner[places := np.asarray(positions, dtype=np.int64)]
            order = np.argsort(owners, kind="stable")
            shards = np.split(order, np.searchsorted(owners[order], np.arange(1, len(shards))))
            repeats = None if repeats is None else repeats[places]
        return ShardSampler(ShardShuffle(shards=shards, seed=seed, window=window, repeats=repeats))

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for place, sample_id in enumerate(self._joined.sample_ids):
            found.setdefault(sample_id, []).append(place)
        return found

    def _place(self, which: int | str) -> int:
        if isinstance(which, str):
            places = self._places.get(which, [])
            if len(places) > 1:
                raise DataError(
                    f"{len(places)} samples of the mixture have the id {which!r}, at the positions {places[:5]}; give a position"
                )
            if not places:
                for cache in self._caches:
                    if which in cache.failed:
                        cache.read(which)  # says why it cannot be
                left_out = self._joined.left_out.get(which)
                why = (
                    "take one of sample_ids, from which limit and data_share leave some out"
                    if left_out is None
                    else f"it was left out: {left_out}"
                )
                raise SampleNotCachedError(
                    f"no sample {which!r} among the {len(self)} that cache and data share; the first is "
                    f"{self.sample_ids[0]!r}; {why}"
                )
            return places[0]
        try:
            place = operator.index(which)
        except TypeError as error:
            raise DataError(f"sample {which!r} ({type(which).__name__}); expected one position or one id") from error
        if not -len(self) <= place < len(self):
            raise IndexError(f"no sample {place}; there are {len(self)}")
        return place % len(self)


def _refuse_default(samples: Sequence[TrainingSample], **_: Any) -> None:
    raise ConfigError("a DataLoader of a DistillationDataset has no collate_fn; give collate_fn=dataset.collate")


default_collate_fn_map[TrainingSample] = _refuse_default  # where torch's documentation says how to add a type


class ShardSampler(Sampler[int]):
    """Positions of one epoch after another; `set_epoch` says which, and it goes on by itself."""

    def __init__(self, shuffle: ShardShuffle) -> None:
        self._shuffle, self._epoch = shuffle, 0

    def __len__(self) -> int:
        return self._shuffle.length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is gone through next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        return iter(self._shuffle.take(epoch * len(self), len(self)).tolist())


class DistillationLoss:
    """The losses of a `DistillationDataset` as one function of a model and a batch.

    The model is the data set's student or any of its kind, and may be wrapped by DDP, accelerate or peft. It runs once, in the
    autocast that the caller is in; losses are computed in float32. Attention and hidden states are recorded by the way, and the
    logits of supervised rows become losses chunk by chunk where the output projection is a plain linear layer. If a loss
    compares attention, the language model's attention runs on SDPA from the first call on.

    Attributes:
        weights: Of each term, those above 0.
    """

    def __init__(self, dataset: DistillationDataset) -> None:
        """Take the losses of a data set.

        Raises:
            ConfigError: If it is no `DistillationDataset`.
        """
        if not isinstance(dataset, DistillationDataset):
            raise ConfigError(f"dataset is {type(dataset).__name__}; expected vlm_distill_cache.DistillationDataset")
        self._objective, self.made_for = dataset.objective, dataset.made_for
        self.weights = dataset.losses.active()
        self._captured: tuple[Any, AttentionCapture | None] = (None, None)

    def __call__(self, model: nn.Module, batch: TrainingBatch, share: Shares | None = None) -> Losses:
        """Run the model over a batch on its device.

        Args:
            share: The batch's part of its optimizer step, from `shares`; None: it is the whole step.

        Returns:
            ``total``, a float32 scalar to call ``backward`` on; ``terms`` and ``measures`` by name, unweighted.

        Raises:
            ConfigError: If the batch is of a data set with other losses, or torch's default dtype is not float32.
            ModelError: If the model is of another kind than the data set's student, or is sharded over processes.
        """
        if not isinstance(batch, TrainingBatch):
            raise ConfigError(
                f"batch is {type(batch).__name__}; expected what DistillationDataset.collate makes (collate_fn=)"
            )
        if torch.get_default_dtype() != torch.float32:
            raise ConfigError(
                f"torch's default dtype is {torch.get_default_dtype()}: call torch.set_default_dtype(torch.float32)"
            )
        refuse_other(batch.made_for, self.made_for, "the batch is of a data set that this loss does not fit")
        base = self.base_of(model)
        device = batch.labels.device.type
        autocast: AbstractContextManager[Any] = nullcontext()
        if torch.is_autocast_enabled(device):
            autocast = torch.autocast(device, dtype=torch.get_autocast_dtype(device))

        def run(**inputs: Any) -> Any:
            with autocast:
                return model(**inputs)

        student = _as_student(base, through=run)
        if self._objective.groups and self._captured[0] is not base:
            self._captured = (base, AttentionCapture(student.language_model))
        if student.family.is_listed:
            for module in student.language_model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module._gradient_checkpointing_func = checkpoint_recorded  # the library's would record nothing
        with torch.autocast(device, enabled=False):
            return self._objective(student, self._captured[1], batch, share or Shares())

    def shares(self, batches: Sequence[TrainingBatch], accelerator: Any = None) -> list[Shares]:
        """The part that each micro-batch of this process has in an optimizer step.

        A term is a mean over supervised rows or images of the **whole** step; with these shares, gradients summed over
        micro-batches and processes are those of one big batch.

        Args:
            batches: All micro-batches of the step on this process.
            accelerator: accelerate's, where ``accelerator.backward`` is called: it divides by its accumulation steps, and
                DDP by the number of processes, which the shares make up for. All processes must call this.
        """
        units = torch.tensor([units_of(batch) for batch in batches], dtype=torch.float64).sum(dim=0)
        scale = 1.0
        if accelerator is not None:
            scale = float(accelerator.num_processes * accelerator.gradient_accumulation_steps)
            if accelerator.num_processes > 1:
                units = accelerator.reduce(units.to(accelerator.device), reduction="sum")
        return [share.times(scale) for share in step_shares(list(batches), units.tolist())]

    def base_of(self, model: Any) -> Any:
        """The model inside its wrappers; a ModelError if it is of another kind than the data set's student."""
        base = unwrapped(model)
        refuse_other({"student": _kind(base)}, self.made_for, f"the model is a {type(base).__name__} of another kind")
        return base


def refuse_other(found: Mapping[str, str], expected: Mapping[str, str], what: str) -> None:
    """Refuse what was made for other losses, another student or other pictures than is expected.

    Raises:
        ConfigError: Naming what differs; a ModelError if it is the student.
    """
    names = found if found.keys() == {"student"} else expected
    if other := next((name for name in names if found.get(name) != expected.get(name)), None):
        kind: type[DistillError] = ModelError if other == "student" else ConfigError
        raise kind(
            f"{what}: {other} {brief(str(found.get(other)))}; expected {brief(str(expected.get(other)))}. Make another "
            + (
                "DistillationDataset with this model as the student"
                if other == "student"
                else "DistillationLoss of that data set, or give both data sets the same losses and student"
            )
        )


def _made_for(prepared: Preparation, model: Any) -> dict[str, str]:
    objective, encoder = prepared.phases[0].objective, prepared.encoder
    default = LossWeights()
    changed = {name: value for name, value in asdict(objective.losses).items() if value != getattr(default, name)}
    return {
        "student": _kind(model),
        "losses": repr({**objective.losses.active(), **changed}),
        "layers": repr((objective.groups, dict(objective.fits))),
        "tokenizer": tokenizer_fingerprint(prepared.tokenizer),
        "image token": str(encoder.image_token_id),
        "image processor": repr(encoder.image_encoder.to_dict()),
    }


def _kind(model: Any) -> str:
    """What of a model must be equal for batches and losses of one to fit another."""
    config = model.config
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    sizes = {
        "vocabulary": text.vocab_size,
        "layers": getattr(text, "num_hidden_layers", None),
        "width": getattr(text, "hidden_size", None),
        "image token": getattr(config, "image_token_id", getattr(config, "image_token_index", None)),
        "image size": getattr(vision, "image_size", None),
        "patch size": getattr(vision, "patch_size", None),
    }
    return ", ".join([str(config.model_type), *(f"{name} {size}" for name, size in sizes.items() if size is not None)])


def _refuse_foreign(target: Path, model: Any) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; give save_student a folder")
    config = target / "config.json"
    if config.exists():
        try:
            stored = read_json(config)
        except (DistillError, OSError):
            stored = None
        found = stored.get("model_type") if isinstance(stored, dict) else "no configuration of a model"
        if found != model.config.model_type:
            raise ConfigError(
                f"{config} is of something else ({brief(str(found))}), a {model.config.model_type} would take its place: give "
                "save_student another folder, or remove that one"
            )


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put adapters among a model's modules."""
    return any(_is_adapter(module) for module in model.modules())


def _is_adapter(module: Any) -> bool:
    return hasattr(module, "unload_and_optionally_merge_module") or (
        hasattr(module, "get_base_layer") and hasattr(module, "merge")
    )


def _merged(model: Any) -> Any:
    """A model whose adapters are added to its weights: a copy that shares all others; the model itself if it has none."""
    if not has_adapters(model):
        return model
    if any(getattr(module, "disable_adapters", False) is True for module in model.modules() if _is_adapter(module)):
        raise ModelError(
            "the model's adapters are switched off, so that it does not say what they would add to its weights: switch them "
            "on (enable_adapter_layers), or save the model that they were put into (unload)"
        )
    adapted = {
        id(part)
        for module in model.modules()
        if _is_adapter(module)
        for part in (*module.parameters(), *module.buffers())
    }
    shared = {id(part): part for part in (*model.parameters(), *model.buffers()) if id(part) not in adapted}
    tied = (model.get_input_embeddings(), model.get_output_embeddings())
    was_tied = tied[0].weight is tied[1].weight or model.config.get_text_config().tie_word_embeddings
    if was_tied and any(_is_adapter(module) for module in tied):
        raise ModelError(
            "adapters change one of the input embedding and the output projection, which are one tensor, so they cannot be "
            "added to the weights: save the adapters alone (save_pretrained of the peft model, save_model of a trainer)"
        )
    copied = copy.deepcopy(model, shared)
    with torch.no_grad():
        for parent in list(copied.modules()):
            for name, module in list(parent.named_children()):
                if _is_adapter(parent) or not _is_adapter(module):
                    continue
                if hasattr(module, "unload_and_optionally_merge_module"):
                    inner = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
                else:
                    module.merge()
                    inner = module.get_base_layer()
                setattr(parent, name, inner)
    copied._hf_peft_config_loaded = False  # the library would write adapters
    return copied


def unwrapped(model: Any, *, keep_adapters: bool = False) -> Any:
    """The model of the model library inside whatever is around it; a ModelError if there is none, or no whole one.

    Args:
        keep_adapters: Stop at a wrapper of peft's.
    """
    while not isinstance(model, PreTrainedModel):
        if why := _UNUSABLE.get(type(model).__name__):
            raise ModelError(f"the model is wrapped by {type(model).__name__}: {why}")
        if hasattr(model, "get_base_model"):
            for config in model.peft_config.values():
                if config.is_prompt_learning:
                    raise ModelError(
                        f"{type(config).__name__} puts tokens before each sequence, so that no position is the teacher's; use "
                        "adapters that change weights, such as LoraConfig"
                    )
            if keep_adapters:
                return model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", None)
        if inner is None:
            raise ModelError(
                f"the model is a {type(model).__name__}; expected a PreTrainedModel of the model library, or one in DDP, "
                "accelerate or peft"
            )
        model = inner
    if type(model).__name__.startswith("FSDP"):  # `fully_shard` names its classes so
        raise ModelError(f"the model is a {type(model).__name__}: {_WHOLE}")
    return model


def _as_student(model: Any, *, through: Callable[..., Any] | None = None) -> LibraryStudent:
    return LibraryStudent(model, family_of(str(model.config.model_type)), through=through)


@contextmanager
def _python_words() -> Iterator[None]:
    """Say what a command line's options are here, in errors that name some."""
    try:
        yield
    except DistillError as error:
        text = str(error).replace("(--data, --images)", "(data=, images=)")
        text = re.sub(r"(pass|give) --(data|images|cache)\b", r"\1 \2=", text)
        text = text.replace("= (and --images)", "= (and images=)")
        if text != str(error):
            error.args = (text, *error.args[1:])
        if "--set" in text:
            error.args = (
                f"{text}. In Python, `--set dft.losses.NAME=VALUE` is losses=LossWeights(NAME=VALUE) of "
                "DistillationDataset, and `--set NAME=VALUE` its argument NAME",
                *error.args[1:],
            )
        raise

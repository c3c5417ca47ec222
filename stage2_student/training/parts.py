"""Which parts of a student a phase trains, and what of it a checkpoint must hold to bring them back.

A checkpoint holds the parameters that any phase so far has trained, and a hash of all others: those come again
from where the student came from. With adapters that is the adapters and the projector instead of the model.
Every phase of adapters begins with new ones and ends by merging them, as the released CompoDistill code loads
its phases; the merged ones stay in the checkpoint, and are merged again, in order, when the run resumes.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm_distill_cache.common.attention.capture import checkpoint_recorded
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.hashing import checksum, fingerprint
from vlm_distill_cache.stage2_student.config import RATES, RateName
from vlm_distill_cache.stage2_student.students.packed import is_packed, unpacked_layer

ADAPTER = "default"
_MARK = ".lora_"
_BASE = ".base_layer."


def decoder_layers(student: Any) -> nn.ModuleList:
    """The decoder layers of a student's language model."""
    layers = getattr(student.language_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"{type(student.language_model).__name__} keeps no list of decoder `layers`, expected of every "
            "language model that gets adapters; train this student with trainable: all"
        )
    return layers


def checkpoint_layers(student: Any, *, tower: bool = False) -> None:
    """Let the decoder layers forget their activations in training and compute them again in the backward pass.

    Recorded attention is forgotten and computed again with them. So do the layers of the vision tower if the ``tower`` is
    trained; else it keeps none anyway.
    """
    layers = list(decoder_layers(student))
    if tower:
        layers += [m for m in student.modules() if isinstance(m, GradientCheckpointingLayer) and m not in layers]
    for layer in layers:
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ModelError(
                f"{type(layer).__name__} is no layer that the model library can checkpoint; set gradient_checkpointing "
                "to false and lower micro_batch_size"
            )
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = checkpoint_recorded


def add_adapters(student: Any, *, rank: int, alpha: float, dropout: float, seed: int) -> list[nn.Parameter]:
    """Put an adapter into every linear layer of the decoder; the student computes what it did before.

    An adapter of two matrices of rank ``rank`` adds ``alpha / rank * B A x``; ``seed`` is of A, and B starts at 0.

    Returns:
        The adapters' parameters, trainable; all else of the student keeps its ``requires_grad``.

    Raises:
        ConfigError: If peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"trainable: lora needs peft ({error}); run: pip install 'vlm-distill-cache[lora]'"
        ) from error
    # From inside the decoder: a name such as `layers.0.self_attn.q_proj` would also match in the vision tower.
    layers = decoder_layers(student)
    names = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    before = {name: parameter.requires_grad for name, parameter in layers.named_parameters()}
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=names)
    packed = any(is_packed(module) for module in layers.modules())
    vars(layers)["is_loaded_in_4bit"] = packed  # peft asks for it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, layers, adapter_name=ADAPTER)
    for name, parameter in layers.named_parameters():
        if _MARK in name:
            parameter.data = parameter.data.float()  # whatever the layers are kept in: they are small
    for name, parameter in layers.named_parameters():
        parameter.requires_grad_(before.get(plain_name(name), True))
    return list(adapter_parameters(student).values())


def adapter_parameters(student: Any) -> dict[str, nn.Parameter]:
    """The adapters' parameters, by their name in the student."""
    return {name: value for name, value in student.named_parameters() if _MARK in name}


def plain_name(name: str) -> str:
    """The name of a tensor in a student without adapters: ``q_proj.base_layer.weight`` is ``q_proj.weight``."""
    return name.replace(_BASE, ".")


@torch.no_grad()
def merge_adapters(student: Any) -> None:
    """Add every adapter to its layer and put the plain layer back: W + alpha / rank * B A.

    The student then computes the same up to rounding, and has the names and the size it had before. Packed layers come back
    as plain ones in main memory, float32.
    """
    from peft.tuners.lora import LoraLayer

    layers = decoder_layers(student)
    adapted = [(name, module) for name, module in layers.named_modules() if isinstance(module, LoraLayer)]
    for name, adapter in adapted:
        base = adapter.get_base_layer()
        if is_packed(base):
            scale, first, then = (getattr(adapter, part)[ADAPTER] for part in ("scaling", "lora_A", "lora_B"))
            base = unpacked_layer(base, scale * (then.weight @ first.weight))
        else:
            adapter.merge(safe_merge=False, adapter_names=[ADAPTER])
        parent, _, child = name.rpartition(".")
        setattr(layers.get_submodule(parent), child, base)
    if hasattr(layers, "peft_config"):
        del layers.peft_config


@contextmanager
@torch.no_grad()
def merged_for_a_while(student: Any) -> Iterator[None]:
    """In the block the student is as `merge_adapters` leaves it; behind it, it is what it was, bit for bit.

    Where there are adapters, main memory holds the decoder's linear weights once more meanwhile.
    """
    if not adapter_parameters(student):
        yield
        return
    from peft.tuners.lora import LoraLayer

    layers = decoder_layers(student)
    adapted = [(name, module) for name, module in layers.named_modules() if isinstance(module, LoraLayer)]
    before = [adapter.get_base_layer().weight.detach().to("cpu", copy=True) for _, adapter in adapted]
    settings = getattr(layers, "peft_config", None)
    merge_adapters(student)
    try:
        yield
    finally:
        for (name, adapter), weight in zip(adapted, before, strict=True):
            parent, _, child = name.rpartition(".")
            setattr(layers.get_submodule(parent), child, adapter)
            adapter.get_base_layer().weight.copy_(weight)
            adapter.merged_adapters.clear()
        if settings is not None:
            layers.peft_config = settings


@torch.no_grad()
def load_adapters(student: Any, values: Mapping[str, Tensor]) -> None:
    """Copy stored adapters over those that are in."""
    own = adapter_parameters(student)
    if own.keys() != values.keys() or any(own[name].shape != value.shape for name, value in values.items()):
        raise ModelError(
            f"stored adapters ({len(values)} tensors) are not those of this student ({len(own)}): another size, rank "
            "or family; use another --output, or delete the folder to begin again"
        )
    for name, value in values.items():
        own[name].copy_(value)


Trainable = Literal["projector", "all", "lora", "tower"]
Part = Literal["projector", "embeddings", "lm_head"]


class TrainedParts:
    """The parts of one student over the phases of one run."""

    def __init__(
        self,
        student: Any,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        pack: Callable[[nn.Module], object] | None = None,
    ) -> None:
        """Look at a student; ``pack`` packs its decoder's layers, again whenever adapters were merged into them."""
        self._student, self._pack = student, pack
        self._rank, self._alpha, self._dropout = rank, alpha, dropout
        self._changed: set[str] = set()
        self._merged: list[dict[str, Tensor]] = []
        # Taken before anything is trained: what a resumed run must find again.
        self._hashes = {name: hash_tensor(value) for name, value in student.named_parameters() if not value.is_meta}

    def begin(
        self,
        *,
        trainable: Trainable,
        freeze: Sequence[Part] = (),
        seed: int = 0,
        tower: Collection[str] = (),
        apart: Collection[RateName] = RATES[:1],
    ) -> dict[RateName, list[nn.Parameter]]:
        """Mark what a phase trains, and freeze the rest.

        Args:
            trainable: The projector side, all but the vision tower, the projector side and new adapters (whose ``seed`` it
                is), or all and the parameters of the vision tower that are named by ``tower``.
            freeze: Left out of it.
            apart: The learning rates that there are.

        Returns:
            What is trained, by the name of its learning rate.
        """
        student = self._student
        if self._pack is not None:
            self._pack(decoder_layers(student))
        # Of a family that is not in the table the projector's place is unknown, and only the whole can be trained.
        wanted = trainable in ("projector", "lora") or "projector" in freeze or "projector_lr" in apart
        projector = student.trainable_parameters("dpt") if wanted else []
        if trainable in ("all", "tower"):
            student.trainable_parameters("dft")
        elif trainable == "lora":
            self._add_adapters(seed)
        tower = set(tower)
        if trainable == "tower":
            for name, parameter in student.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or name in tower)
        parts = {
            "projector": lambda: projector,
            "embeddings": lambda: student.get_input_embeddings().parameters(),
            "lm_head": lambda: student.get_output_embeddings().parameters(),
        }
        for part in freeze:
            for parameter in parts[part]():
                parameter.requires_grad_(False)
        trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
        if not trained:
            raise ConfigError(
                f"trainable: {trainable} without {', '.join(freeze)} leaves nothing to train; shorten `freeze`"
            )
        self._changed |= {plain_name(name) for name in trained if _MARK not in name}
        # A projector inside the tower is the projector.
        rates = dict.fromkeys(map(id, trained.values()), "lr")
        if "tower_lr" in apart:
            rates |= {id(value): "tower_lr" for name, value in trained.items() if name in tower}
        if "projector_lr" in apart:
            rates |= {id(value): "projector_lr" for value in projector}
        return {rate: [value for value in trained.values() if rates[id(value)] == rate] for rate in apart}

    def finish(self) -> None:
        """End a phase: merge its adapters, if it had any, into the layers they belong to."""
        if adapters := adapter_parameters(self._student):
            self._merged.append({name: value.detach().cpu().clone() for name, value in adapters.items()})
            merge_adapters(self._student)

    def state(self, student: Any = None) -> dict[str, Any]:
        """What brings this student back, tensors and plain values; of a divided ``student`` that is trained in its place."""
        values = {
            name: value.detach()
            for name, value in (student or self._student).named_parameters()
            if plain_name(name) in self._changed or _MARK in name
        }
        # Those into weights that were trained as such later are in the values.
        merged = [
            adapters
            for adapters in self._merged
            if not {f"{name.partition(_MARK)[0]}.weight" for name in adapters} <= self._changed
        ]
        return {"values": values, "merged": merged, "frozen": self._frozen()}

    def replay(self, state: Mapping[str, Any]) -> None:
        """Bring back what ended before the phase in which a state was saved; call before `begin`.

        Raises:
            ConfigError: If the parts that were never trained are others than those the state was saved with.
        """
        self._changed = {plain_name(name) for name in state["values"] if _MARK not in name}
        if self._frozen() != state["frozen"]:
            raise ConfigError(
                "the student's weights before training are not those that this run began with: its directory, the "
                "cache's vision tower or a library changed; restore them, use another --output, or delete the "
                "folder to begin again"
            )
        for adapters in state["merged"]:
            self._add_adapters(0)
            load_adapters(self._student, adapters)
            self.finish()

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Copy a state's values into the student; call after `begin` of the phase in which it was saved."""
        own = dict(self._student.named_parameters())
        values = state["values"]
        here = self.state()["values"].keys()
        other = here ^ values.keys() or {name for name in here if own[name].shape != values[name].shape}
        if other:
            raise ConfigError(
                f"the checkpoint holds other parts than this phase trains: {sorted(other)[:5]}; use "
                "another --output, or delete the folder to begin again"
            )
        for name, value in values.items():
            own[name].copy_(value)

    def _add_adapters(self, seed: int) -> None:
        if self._pack is not None:
            self._pack(decoder_layers(self._student))
        add_adapters(self._student, rank=self._rank, alpha=self._alpha, dropout=self._dropout, seed=seed)

    def _frozen(self) -> str:
        """Hash of all parameters that no phase so far has trained."""
        frozen = {name: value for name, value in self._hashes.items() if name not in self._changed}
        return fingerprint(frozen)


def hash_tensor(value: Tensor) -> str:
    """xxh3_128 of a tensor's bytes."""
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return checksum(content.numpy().data)

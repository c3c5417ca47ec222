"""What a training keeps in memory from step to step, counted from tensors or told from a student on no device.

Weights, gradients and the optimizer's averages follow from names, shapes and options alone; what a step takes beside them
has to be measured (`training.estimate`), or told from the decoder (`decoder_activations`).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AttentionInterface

from vlm_distill_cache.data.families.models import BLOCK
from vlm_distill_cache.stage2_student.config import PhaseConfig, TrainConfig
from vlm_distill_cache.stage2_student.students.packed import weight_bytes
from vlm_distill_cache.stage2_student.training import optimizers
from vlm_distill_cache.stage2_student.training.parts import TrainedParts, decoder_layers

_FLOAT, _HALF, _AVERAGES = 4, 2, 8  # bytes of a value; of both averages in float32
_COUNTED = "vlm_distill_counted"


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that one process holds.

    Attributes:
        trained: Parameters that are trained, of all processes.
        parameters: All parameters.
        weights: Of all parameters, scales of packed ones included.
        gradients: Once a backward pass is done.
        averages: The optimizer's state.
        gathered: Of a divided student, what of it is whole for a while: all but the decoder, and two of its layers.
    """

    trained: int
    parameters: int
    weights: int
    gradients: int
    averages: int
    gathered: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.averages + self.gathered


def counted(model: nn.Module, optimizer: Optimizer) -> Held:
    """What a student and its optimizer hold, from the sizes of their tensors."""
    parameters = list(model.parameters())
    trained = [value for value in parameters if value.requires_grad]
    kept = [value for averages in optimizer.state.values() for value in _tensors(averages)]
    return Held(
        trained=sum(value.numel() for value in trained),
        parameters=sum(_values(value) for value in parameters),
        weights=weight_bytes(model),
        gradients=sum(value.grad.nbytes for value in trained if value.grad is not None),
        averages=sum({value.untyped_storage().data_ptr(): value.nbytes for value in kept}.values()),
    )


def _tensors(averages: Any) -> Iterator[Tensor]:
    yield from (value for value in averages.values() if isinstance(value, Tensor))


def _values(value: Tensor) -> int:
    state = getattr(value, "quant_state", None)
    return value.numel() if state is None else state.shape.numel()


def predicted(shell: Any, config: TrainConfig, phase: PhaseConfig, *, processes: int = 1) -> Held:
    """What a phase would hold.

    Args:
        shell: The student on no device (meta); it stays as it is.
        config: Ways of keeping it: ``weights``, ``optimizer``, ``quantisation``, ``sharding``, ``lora``.
        phase: What is trained; of a vision tower all of it.
        processes: How many a student is divided among, where it is.

    Raises:
        ConfigError: If the phase trains nothing, or adapters without peft.
        ModelError: If the decoder's place is not known, and has to be.
    """
    student = copy.deepcopy(shell)
    names = [name for name, _ in student.named_parameters() if phase.trainable == "tower" and _of_tower(name)]
    with torch.device("meta"):  # adapters, too
        TrainedParts(student, **vars(config.lora)).begin(
            trainable=phase.trainable, freeze=phase.freeze, tower=names, apart=phase.rates
        )
    packed = set(map(id, _packable(student))) if config.quantisation != "none" else set()
    divided = processes if config.sharding != "none" and processes > 1 else 1
    totals = dict.fromkeys(("trained", "parameters", "weights", "gradients", "averages"), 0)
    for name, value in student.named_parameters():
        count, size = value.numel(), _HALF if config.weights == "bfloat16" and ".lora_" not in name else _FLOAT
        totals["parameters"] += count
        totals["weights"] += count // 2 + -(-count // BLOCK) * _FLOAT if id(value) in packed else count * size
        if value.requires_grad:
            totals["trained"] += count
            totals["gradients"] += count * size
            totals["averages"] += _averages(count, config.optimizer)
    if config.optimizer == "adamw8bit" and totals["averages"]:
        totals["averages"] += 2 * optimizers.CODES * _FLOAT  # what a byte stands for, once
    shares = {name: -(-totals[name] // divided) for name in ("weights", "gradients", "averages")}
    return Held(**totals | shares, gathered=0 if divided == 1 else _gathered(student, config))


def _of_tower(name: str) -> bool:
    return "vision" in name or "visual" in name


def _packable(student: Any) -> Iterator[Tensor]:
    """The weights that `pack_layers` would pack; of a layer with adapters its own."""
    for name, layer in decoder_layers(student).named_modules():
        if type(layer) is nn.Linear and ".lora_" not in f".{name}" and layer.in_features % BLOCK == 0:
            yield layer.weight


def _averages(count: int, kind: optimizers.Kind) -> int:
    if kind == "adamw8bit" and count >= optimizers.LEAST_8BIT:
        return 2 * count + 2 * -(-count // optimizers.BLOCK) * _FLOAT
    return _AVERAGES * count + (_FLOAT if kind == "adamw" else 0)  # torch keeps its count of steps in a tensor


def _gathered(student: Any, config: TrainConfig) -> int:
    layers: list[nn.Module] = list(decoder_layers(student))
    largest = max(sum(value.numel() for value in layer.parameters()) for layer in layers)
    rest: int = sum(value.numel() for value in student.parameters()) - sum(
        value.numel() for layer in layers for value in layer.parameters()
    )
    return (rest + 2 * largest) * (_HALF if config.dtype == "bfloat16" else _FLOAT)


def decoder_activations(shell: Any, *, tokens: int, samples: int, half: bool, checkpointing: bool) -> int:
    """Bytes that a decoder keeps for its backward pass, of a pass without values.

    Args:
        shell: The student on no device (meta); it stays as it is.
        tokens: Of a sample.
        samples: Of a pass.
        half: Whether the arithmetic is in bfloat16.
        checkpointing: Whether layers are computed again: then each keeps its input, and one of them all of it.

    Raises:
        ModelError: If its place is not known.
    """
    from vlm_distill_cache.stage2_student.training.live_bytes import LiveBytes

    AttentionInterface.register(_COUNTED, _counted_attention)
    depth = len(decoder_layers(shell))
    dtype = torch.bfloat16 if half else torch.float32
    decoder = copy.deepcopy(shell.language_model).to(dtype).train()
    decoder.set_attn_implementation(_COUNTED)
    width = int(decoder.config.hidden_size)
    entering: Tensor = torch.empty(samples, tokens, width, device="meta", dtype=dtype, requires_grad=True)
    with torch.enable_grad(), LiveBytes(*decoder.parameters(), *decoder.buffers(), entering) as live:
        output = decoder(inputs_embeds=entering, use_cache=False)
        kept: int = live.now
    del output
    inputs: int = depth * entering.nbytes
    return kept // depth + inputs if checkpointing else kept


def _counted_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Keep what fused attention keeps: query, key, value and result, and no map."""
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    return (query * key * value).transpose(1, 2), None

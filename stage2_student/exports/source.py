"""What an export starts from, and its weights in another precision."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.changed import changes_of
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.data.families.models import BLOCK, PACKED_ROWS, placement
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.stage2_student.students.library import LibraryStudent
from vlm_distill_cache.stage2_student.students.model import StudentModel

Quantise = Literal["8bit", "4bit"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A trained student that is to be exported.

    Attributes:
        folder: Where it lies, for errors.
        model: On the CPU, in float32.
        encoder: How it reads samples, with its tokenizer.
        image_processor: Of a family that is not listed, the library's whole processor.
        provenance: What it says of itself.
        dtype: Of the exported weights.
        quantise: What the language model's weights are quantised to; None: they are not.
        portable: Refuse what some processors cannot compute with.
        trained: What the last checkpoint of its training holds of the student (``TrainedParts.state``).
    """

    folder: Path
    model: StudentModel
    encoder: SampleEncoder
    image_processor: Any
    provenance: Mapping[str, Any]
    dtype: torch.dtype
    quantise: Quantise | None
    trained: Callable[[], Mapping[str, Any]]
    portable: bool = True

    @property
    def core(self) -> Any:
        """The library's model, or ours."""
        return self.model.model if isinstance(self.model, LibraryStudent) else self.model

    @property
    def own(self) -> VisionLanguageModel | None:
        """The model if it is of one of our classes."""
        return self.model if isinstance(self.model, VisionLanguageModel) else None

    @property
    def square(self) -> str:
        """How a picture becomes a square, of students of one fixed grid: ``pad``, ``square`` or ``crop``."""
        return str(getattr(self.encoder.image_encoder, "layout", "square"))


def refuse(source: Source, layout: str, why: str) -> ModelError:
    """The error about a student that a layout cannot hold."""
    return ModelError(f"{source.folder}: cannot be written in layout {layout}: {why}; `--layout auto` always can")


def refuse_changed(source: Source, layout: str) -> None:
    """Refuse a student that other programs would run otherwise than it is: they do not know what is changed in it.

    Raises:
        ModelError: Naming the changes.
    """
    if changed := sorted(changes_of(source.core.config)):
        raise refuse(source, layout, f"its config.json says {', '.join(changed)}, which that layout cannot say")


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype, *, where: str) -> dict[str, Tensor]:
    """Tensors in another precision, contiguous.

    Raises:
        ModelError: Naming the tensor, if a value of it is beyond that precision's range.
    """
    return {name: _cast(name, value, dtype, where) for name, value in tensors.items()}


def _cast(name: str, value: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    if not value.is_floating_point():
        return value.contiguous()
    found = value.detach().to(dtype).contiguous()
    if not torch.isfinite(found).all():
        largest, short = value.detach().abs().max().item(), str(dtype).removeprefix("torch.")
        raise ModelError(
            f"{where}: {name} holds {largest:.6g}, and {short} ends at {torch.finfo(dtype).max:.6g}; export it with --dtype "
            "bfloat16 or float32"
            if largest < float("inf")
            else f"{where}: {name} holds numbers that are not finite, so nothing can be computed with it; train it again"
        )
    return found


def exported_model(source: Source) -> Any:
    """The student's model in the wanted precision, quantised if that is wanted.

    Raises:
        ConfigError: If bitsandbytes is missing.
        ModelError: As of `cast`.
    """
    core, where = source.core, str(source.folder)
    if source.quantise is None:
        for name, value in core.state_dict().items():
            _cast(name, value, source.dtype, where)
        return core.to(source.dtype)
    dtype = str(source.dtype).removeprefix("torch.")
    options = placement(family_of(core.config.model_type), dtype=dtype, device_map="cpu", quantisation=source.quantise)
    kept = tuple(options["quantization_config"].llm_int8_skip_modules)
    for name, module in core.named_modules() if source.quantise == "4bit" and source.portable else ():
        if type(module) is nn.Linear and not name.startswith(kept) and not _fits_blocks(module):
            raise ModelError(
                f"{where}: {name} reads {module.in_features} values and writes {module.out_features}, and some processors "
                f"compute with 4-bit weights in whole blocks of {BLOCK} values and {PACKED_ROWS} rows alone; take --quantise "
                "8bit, or leave it out"
            )
    state = cast(core.state_dict(), source.dtype, where=where)
    model = type(core).from_pretrained(None, config=core.config, state_dict=state, dtype=source.dtype, **options)
    model.generation_config = core.generation_config
    return model.eval()


def unpack_odd_layers(model: nn.Module) -> None:
    """Put the values that they stand for in the place of 4-bit layers that are no whole blocks, in float32.

    On processors with AVX-512, bitsandbytes 0.50 fails on some of them and multiplies others by the scales of other blocks.
    """
    for name, layer in list(model.named_modules()):
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is None or _fits_blocks(layer):
            continue
        packed: Any = layer
        values = unpack_4bit(packed.weight.data, state.absmax, state.code, state.shape, state.blocksize)
        plain = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
        plain.weight = nn.Parameter(values, requires_grad=False)
        if packed.bias is not None:
            plain.bias = nn.Parameter(packed.bias.data.float(), requires_grad=False)
        model.set_submodule(name, plain)


def unpack_4bit(packed: Tensor, scales: Tensor, code: Tensor, shape: torch.Size, block: int) -> Tensor:
    """The values of 4-bit weights, float32 of ``shape``: ``code[number] * scale of its block``, blocks as the values lie.

    Args:
        packed: Two numbers a byte, the first in the upper half.
        scales: Of each block of ``block`` values, float ``[ceil(values / block)]``.
        code: What each number stands for, float ``[16]``.
    """
    halves = packed.view(torch.uint8).flatten()
    numbers = torch.stack([halves >> 4, halves & 15], dim=1).flatten()[: shape.numel()].long()
    return (code.float()[numbers] * scales.float().repeat_interleave(block)[: shape.numel()]).reshape(shape)


def _fits_blocks(layer: Any) -> bool:
    return not (int(layer.in_features) % BLOCK or int(layer.out_features) % PACKED_ROWS)

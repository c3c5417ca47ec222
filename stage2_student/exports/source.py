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
from vlm_distill_cache.data.families.models import placement
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.stage2_student.students.library import LibraryStudent
from vlm_distill_cache.stage2_student.students.model import StudentModel

Quantise = Literal["8bit", "4bit"]
_BLOCK = 64


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
    for name, module in core.named_modules() if source.quantise == "4bit" else ():
        if type(module) is nn.Linear and not name.startswith(kept) and module.in_features % _BLOCK:
            raise ModelError(
                f"{where}: {name} reads {module.in_features} values, and 4-bit weights are packed in blocks of {_BLOCK}, which "
                "some processors compute with whole blocks alone; take --quantise 8bit, or leave it out"
            )
    state = cast(core.state_dict(), source.dtype, where=where)
    model = type(core).from_pretrained(None, config=core.config, state_dict=state, dtype=source.dtype, **options)
    model.generation_config = core.generation_config
    return model.eval()

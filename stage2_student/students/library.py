"""A student of any family of the model library, behind the interface that training and evaluation use.

The library's own forward pass runs; what differs between families stands in ``data.families.table``. Only the
supervised rows enter the output projection, so that ``[B, T, V]`` never exists.

Dims: B batch, T sequence, A supervised rows, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.vision_language import PHASES, Phase
from vlm_distill_cache.data.families.inputs import text_config
from vlm_distill_cache.data.families.models import (
    find_family_model,
    rows_instead,
    rows_only,
)
from vlm_distill_cache.data.families.table import Family, submodule
from vlm_distill_cache.data.images.encoder import AnyImageEncoder
from vlm_distill_cache.data.text.collate import Batch
from vlm_distill_cache.data.text.encoding import EncodedSample


@dataclass(frozen=True)
class SupervisedOutput:
    """Logits of the supervised rows, float ``[A, V]``, in batch-row order."""

    logits: Tensor


class LibraryStudent(nn.Module):
    """One model of the library as a student."""

    def __init__(self, model: Any, family: Family, *, through: Callable[..., Any] | None = None) -> None:
        """Wrap a model; ``through`` is called in its place, such as the model in wrappers of somebody else's."""
        super().__init__()
        self.model = model
        self.family = family
        self._through = (through,)  # a tuple: a wrapper is no part of this module

    def _run(self, **inputs: Any) -> Any:
        return (self._through[0] or self.model)(**inputs)

    @property
    def config(self) -> Any:
        """The library's configuration."""
        return self.model.config

    @property
    def image_token_id(self) -> int:
        """Id of one visual token in ``input_ids``."""
        return self.family.image_token_id(self.model.config)

    @property
    def language_model(self) -> Any:
        """The decoder whose attention is captured."""
        if not self.family.is_listed:
            raise ModelError(
                f"student of model_type {self.model.config.model_type!r}: its language model's place is not known "
                "(data/families/table.py), so its attention cannot be captured; set the weights of all attention losses "
                "to 0 and train it with lm and logits"
            )
        return submodule(self.model, self.family.language_model)

    def model_inputs(self, batch: Batch) -> Mapping[str, Any]:
        """A batch as keyword arguments of ``forward``."""
        return self.family.model_inputs(self.model.config, batch, dtype=self._dtype)

    def generation_inputs(
        self, prompts: Sequence[EncodedSample], pad_id: int, device: torch.device
    ) -> Mapping[str, Any]:
        """Prompts as keyword arguments of ``generate``, padded on the left."""
        return self.family.generation_inputs(self.model.config, prompts, pad_id, device, dtype=self._dtype)

    @property
    def fused_settings(self) -> dict[str, Any] | None:
        """What of its logits a fused loss must know; None where that is not known, so that it needs whole logits."""
        if not self.family.is_listed or type(self.get_output_embeddings()) is not nn.Linear:
            return None
        return {"softcap": getattr(text_config(self.model.config), "final_logit_softcapping", None)}

    def forward(
        self, *, supervised: Tensor | None = None, on_rows: Callable[[Tensor, Any], Any] | None = None, **inputs: Any
    ) -> Any:
        """Predict next tokens; with ``supervised``, only for the rows that a loss needs.

        Args:
            supervised: Bool ``[B, T]``; None: all rows.
            on_rows: With ``supervised``: called with the rows' hidden states and the output projection in its place.

        Returns:
            ``logits``: float ``[A, V]`` in batch-row order with ``supervised``, else the library's output.
        """
        if supervised is None:
            return self._run(**inputs)
        if on_rows is not None:
            found: list[Any] = []
            with rows_instead(self.model, supervised, on_rows, found):
                self._run(**inputs)
            return found[0]
        with rows_only(self.model, supervised):
            return SupervisedOutput(logits=self._run(**inputs).logits[0])

    def trainable_parameters(self, phase: Phase) -> list[nn.Parameter]:
        """Mark what a phase trains, freeze the rest, and return what is trained.

        The projector side is all that is neither vision tower nor language model (LLaVA-NeXT's newline
        embedding, for one); a projector inside the tower (Qwen-VL's merger) belongs to it. One of our own models
        decides itself.
        """
        if phase not in PHASES:
            raise ModelError(f"phase: got {phase!r}; choose one of {', '.join(PHASES)}")
        own = getattr(self.model, "trainable_parameters", None)
        if own is not None:
            return list(own(phase))
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # packed ones cannot
        if phase == "dpt":
            self.language_model.requires_grad_(False)
            for embedding in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
                embedding.requires_grad_(False)
        if self.family.is_listed:
            submodule(self.model, self.family.vision_tower).requires_grad_(False)
            submodule(self.model, self.family.projector).requires_grad_(True)
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def get_input_embeddings(self) -> Any:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The output projection."""
        return self.model.get_output_embeddings()

    def __call__(self, **inputs: Any) -> Any:
        """As of every module."""
        return super().__call__(**inputs)

    def generate(self, **inputs: Any) -> Any:
        """Continue prompts, as the library's ``generate``."""
        return self.model.generate(**inputs)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the library's model alone, so that `from_pretrained` finds it."""
        self.model.save_pretrained(folder, **options)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype


def core_of(student: Any) -> Any:
    """The library's model, or ours, of a student that may be wrapped for several devices."""
    inner = getattr(student, "module", student)
    return inner.model if isinstance(inner, LibraryStudent) else inner


@dataclass(frozen=True, kw_only=True)
class OpenedStudent:
    """What lies in a student's folder; of a family that is not listed, `image_processor` is its whole processor."""

    model: LibraryStudent
    tokenizer: Any
    image_processor: Any
    image_encoder: AnyImageEncoder


def open_library_student(folder: Path) -> OpenedStudent:
    """Open a checkpoint directory of any family as a student, in float32."""
    found, load = find_library_student(folder)
    return replace(found, model=load())


def find_library_student(
    folder: Path, *, vision_tower: Path | None = None, dtype: str = "float32"
) -> tuple[OpenedStudent, Callable[[], LibraryStudent]]:
    """Look through a checkpoint directory of any family; ``vision_tower`` and ``dtype`` are `find_family_model`'s.

    Returns:
        The student, its model on no device (meta), and what loads the model.
    """
    opened, load = find_family_model(folder, dtype=dtype, vision_tower=vision_tower)
    found = OpenedStudent(
        model=LibraryStudent(opened.model, opened.family),
        tokenizer=opened.tokenizer,
        image_processor=opened.processor,
        image_encoder=opened.image_encoder,
    )
    return found, lambda: LibraryStudent(load(), opened.family)

"""What training and evaluation use of a student, whoever wrote its model.

MobileVLM (``common.models``) and any model of the model library (``students.library``) go through the same few
names, so that the loop, the losses and the scores know no family.

Dims: B batch, T sequence, A supervised rows, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from vlm_distill_cache.common.models.vision_language import Phase
from vlm_distill_cache.data.text.collate import Batch
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.data.text.generation import GenerationInputs, left_padded_inputs


class StudentModel(Protocol):
    """A vision-language model that can be trained; a torch module."""

    training: bool

    @property
    def config(self) -> Any:
        """The model library's configuration."""

    @property
    def language_model(self) -> Any:
        """The decoder whose attention is captured."""

    def __call__(self, **inputs: Any) -> Any:
        """Run; with ``supervised`` bool ``[B, T]`` the result's ``logits`` are ``[A, V]``, in batch-row order."""

    def trainable_parameters(self, phase: Phase) -> list[nn.Parameter]:
        """Mark what a phase trains (the projector side; from ``dft`` on the language model too), freeze the rest."""

    def get_output_embeddings(self) -> Any:
        """The output projection."""

    def generate(self, **inputs: Any) -> Any:
        """Continue prompts, as the model library's ``generate``."""

    def save_pretrained(self, folder: str | Path) -> Any:
        """Write configuration and weights where `from_pretrained` finds them."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As of every module, and so the rest."""

    def modules(self) -> Iterator[nn.Module]:
        """As of every module."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training."""

    def eval(self) -> Any:
        """Switch to evaluation."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or convert."""

    def state_dict(self) -> dict[str, Any]:
        """All weights by name."""


def model_inputs_of(model: Any, batch: Batch) -> Mapping[str, Any]:
    """A batch as keyword arguments of a model; its family's own where it has peculiarities."""
    own = getattr(getattr(model, "module", model), "model_inputs", None)
    inputs: Mapping[str, Any] = batch.model_inputs() if own is None else own(batch)
    return inputs


def generation_inputs_of(model: Any) -> GenerationInputs:
    """What makes the arguments of a model's ``generate``; its family's own where it has peculiarities."""

    def make(prompts: Sequence[EncodedSample], pad_id: int, device: torch.device) -> Mapping[str, Any]:
        own = getattr(model, "generation_inputs", None)
        inputs: Mapping[str, Any] = (left_padded_inputs if own is None else own)(prompts, pad_id, device)
        return inputs

    return make


def packs_conversations(model: Any) -> bool:
    """Whether conversations about one picture can share it in one sequence; not where it sees their questions."""
    family = getattr(getattr(model, "module", model), "family", None)
    return family is None or bool(family.packs)


def vocabulary_rows(model: StudentModel) -> int:
    """How many token ids a student can say: rows of its output projection."""
    return int(model.get_output_embeddings().weight.shape[0])

"""A checkpoint in its authors' own layout, looked through before a value of it is read, then loaded tensor by tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vlm_distill_cache.common.models.weight_files import Weights, check_tensors

_REMEDY = "expected exactly the tensors of the published checkpoint: download config.json and weights again"


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A model's configuration and all of its tensors, by the names that its class gives them.

    Attributes:
        where: The checkpoint's folder, for errors.
        model_class: Class of the model; its ``from_pretrained`` is the library's.
        weights: Read when the model is loaded.
        tokenizer_folder: Where the tokenizer's files lie.
        tower_folder: Where the vision tower was found outside of the checkpoint; its image processor lies there, too.
        files: All files that weights are read from, by a name that tells whose they are.

    Raises:
        ModelError: If the tensors are not exactly the model's.
    """

    where: Path
    model_class: Any
    config: Any
    weights: Weights
    tokenizer_folder: Path
    tower_folder: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = self.shell.state_dict()
        tied = sorted(name for name in expected.keys() - self.weights.keys() if name.endswith("lm_head.weight"))
        embedding = next((name for name in self.weights if name.endswith("embed_tokens.weight")), None)
        if self.config.tie_word_embeddings and tied and embedding is not None:
            self.weights[tied[0]] = self.weights[embedding]
        check_tensors(self.weights, expected, where=str(self.where), remedy=_REMEDY)

    @cached_property
    def shell(self) -> Any:
        """The model on no device: names, shapes and kinds."""
        with torch.device("meta"):
            return self.model_class(self.config)

    @property
    def processor_folders(self) -> list[Path]:
        """Where the image processor may lie, the checkpoint's own folder first."""
        return [self.where] if self.tower_folder is None else [self.where, self.tower_folder]

    def load(self, *, dtype: torch.dtype | None = None, **placement: Any) -> Any:
        """Make the model, in evaluation mode: one tensor is read and converted after the other.

        Args:
            dtype: Of all weights; None: as stored.
            placement: How the library places or quantises weights as they come; nothing: on the CPU.
        """
        if dtype is None:
            dtype = next(value.dtype for value in self.weights.values() if value.dtype.is_floating_point)
        model = self.model_class.from_pretrained(
            None, config=self.config, state_dict=dict(self.weights), dtype=dtype, **placement
        )
        return model.eval()

"""A teacher as stage one uses it: load a checkpoint directory, run a batch, return only what is wanted.

The forward pass uses SDPA; attention is recomputed only for the requested layers, rows and columns, and the
output projection runs on supervised rows only, so neither ``[B, H, T, T]`` nor ``[B, T, V]`` ever exists.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from common.atomic import read_json
from common.errors import ModelError
from common.layers import teacher_groups
from common.schema import IGNORE_INDEX
from common.visual_attention import AttentionCapture, AttentionRequest
from data.collate import Batch, supervised_rows, text_rows, visual_keys
from data.encoding import ImageEncoder
from data.families import Family, family_of, submodule
from data.fingerprints import module_fingerprint, tokenizer_fingerprint, weights_fingerprint
from data.processors import load_image_processor, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TeacherOutput:
    """What one forward pass leaves behind.

    Attributes:
        logits: Rows of all supervised positions, sample after sample, ``[A, V]`` in the model's dtype.
        labels: Their targets, int64 ``[A]``.
        row_counts: Supervised rows of each sample.
        attention: By request name: float32 ``[B, G, R, M]``, zero where rows or keys are padding.
        visual_counts: Visual tokens of each sample.
    """

    logits: Tensor
    labels: Tensor
    row_counts: tuple[int, ...]
    attention: dict[str, Tensor]
    visual_counts: tuple[int, ...]


class Teacher:
    """A loaded teacher with its tokenizer, image encoder and fingerprints."""

    def __init__(self, directory: Path, *, dtype: str = "auto", device: str = "auto") -> None:
        """Load a checkpoint directory as ``save_pretrained`` writes it.

        Args:
            directory: Model, tokenizer and image processor files.
            dtype: ``auto`` is float32 on CPU, bfloat16 on CUDA.
            device: ``auto`` is CUDA when there is one.

        Raises:
            ModelError: If the directory is missing or not a supported family.
        """
        if not (directory / "config.json").is_file():
            raise ModelError(
                f"teacher {directory}: no config.json there; TEACHER must be a checkpoint directory "
                "with model, tokenizer and image processor files"
            )
        self.directory = directory
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        if dtype == "auto":
            dtype = "float32" if self.device.type == "cpu" else "bfloat16"
        self.dtype = dtype
        try:
            config = AutoConfig.from_pretrained(directory)
            self.family: Family = family_of(config, f"teacher {directory}")
            model_class = getattr(transformers, self.family.model_class)
            model = model_class.from_pretrained(
                directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            )
            self.tokenizer = load_tokenizer(directory)
            processor = load_image_processor(directory)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(
                f"teacher {directory} cannot be loaded: {error}; it needs config.json, weights, "
                "tokenizer and preprocessor_config.json of one supported model"
            ) from error
        self.model: Any = model.to(self.device).eval().requires_grad_(requires_grad=False)
        self.config = model.config
        self.image_grid = self.family.image_grid(self.config)
        self.image_encoder = ImageEncoder.from_processor(processor, self.image_grid)
        self.image_token_id = int(self.config.image_token_index)
        self.pad_token_id = int(self.tokenizer.pad_token_id or 0)
        self.training = _training_notes(directory)
        self.depth = int(self.config.text_config.num_hidden_layers)
        self.lm_head = submodule(self.model, self.family.lm_head)
        self.capture = AttentionCapture(submodule(self.model, self.family.language_model))

    @property
    def vision_tower(self) -> nn.Module:
        """The vision tower."""
        return submodule(self.model, self.family.vision_tower)

    @property
    def projector(self) -> nn.Module:
        """The projector from vision width to language width."""
        return submodule(self.model, self.family.projector)

    def fingerprints(self) -> dict[str, str]:
        """Hashes of what this teacher is: weights and dtype, tokenizer, vision tower."""
        return {
            "teacher": weights_fingerprint(self.directory, self.dtype),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "vision_tower": module_fingerprint(self.vision_tower),
        }

    def groups(self, count: int, layers: str) -> tuple[tuple[int, ...], ...]:
        """Language-model layers of each group that a cache keeps."""
        return teacher_groups(self.depth, count, layers)  # type: ignore[arg-type]

    @torch.inference_mode()
    def run(
        self,
        batch: Batch,
        *,
        groups: tuple[tuple[int, ...], ...],
        answer_rows: bool,
        visual_rows: bool,
        text: bool = False,
    ) -> TeacherOutput:
        """Run one batch and keep supervised rows only.

        Args:
            batch: A collated batch; moved to the teacher's device here.
            groups: Layers of each attention group.
            answer_rows: Capture attention of supervised rows on visual tokens (``"answer"``).
            visual_rows: Capture attention of visual tokens on visual tokens (``"visual"``).
            text: Capture attention of all text rows on visual tokens (``"text"``).

        Returns:
            Logits, labels and attention of the batch.
        """
        batch = batch.to(self.device)
        keys = visual_keys(batch)
        requests: dict[str, AttentionRequest] = {}
        if keys.shape[1]:
            if answer_rows:
                requests["answer"] = AttentionRequest(supervised_rows(batch), keys, groups)
            if text:
                requests["text"] = AttentionRequest(text_rows(batch), keys, groups)
            if visual_rows:
                requests["visual"] = AttentionRequest(keys, keys, groups)
        inputs = self.family.model_inputs(self.config, batch, dtype=getattr(torch, self.dtype))
        with self.capture.record(requests) as attention:
            hidden = self.model.model(**inputs, use_cache=False).last_hidden_state  # [B, T, D]
        supervised = batch.labels != IGNORE_INDEX  # [B, T]
        return TeacherOutput(
            logits=self.lm_head(hidden[supervised]),
            labels=batch.labels[supervised],
            row_counts=tuple(int(n) for n in supervised.sum(1)),
            attention=dict(attention),
            visual_counts=tuple(int(n) for n in batch.visual_mask.sum(1)),
        )


def _training_notes(directory: Path) -> dict[str, Any]:
    """What a built-in teacher says of itself in ``training.json``; nothing for other checkpoints."""
    path = directory / "training.json"
    notes = read_json(path) if path.is_file() else {}
    return notes if isinstance(notes, dict) else {}

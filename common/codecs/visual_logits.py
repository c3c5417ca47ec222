"""Top-k logits at visual tokens: what the teacher expects behind each of them, as LLaVA-KD distils.

The logit codec under other names; a visual token has no ground truth, so its likeliest token stands for one.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.codecs.logits import LogitCodec, SparseLogits

AXES = {"row": "visual", "entry": "visual_entry"}
PREFIX = "visual_"


@dataclass(frozen=True, kw_only=True)
class VisualLogitsCodec(LogitCodec):
    """How a record stores logits of visual rows; presets, bounds and settings are those of ``LogitCodec``.

    Stored once per image and prefix, like all that visual rows see.

    Source:
        LLaVA-KD (arXiv 2410.16236), section 3: distillation of visual tokens' output distributions.
    """

    signal: ClassVar[str] = "visual_logits"

    def fields(self) -> tuple[Field, ...]:
        """As ``LogitCodec.fields``, per visual token."""
        return tuple(
            replace(field, name=PREFIX + field.name, axis=AXES[field.axis]) for field in super().fields()
        )

    @torch.no_grad()
    def select_rows(self, logits: Tensor) -> SparseLogits:
        """Keep the likely tokens of dense logits ``[N, V]``; see ``LogitCodec.select``."""
        return self.select(logits, logits.argmax(dim=1))

    def encode(self, sparse: SparseLogits) -> Record:
        """Pack rows ``[N]``; see ``LogitCodec.encode``."""
        return {PREFIX + name: array for name, array in super().encode(sparse).items()}

    def decode(self, record: Record) -> SparseLogits:
        """Unpack rows ``[N]``; see ``LogitCodec.decode``."""
        return super().decode(plain_names(record))


def plain_names(record: Record) -> Record:
    """The arrays of ``visual_logits`` under the names that ``logits`` gives them."""
    names = ("entry_count", "token_ids", "log_gap", "top_logprob", "tail_logmass")
    return {name: record[PREFIX + name] for name in names}

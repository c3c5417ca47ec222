"""Losses of a student that feeds fewer visual tokens: which cells it can look at, and which losses it cannot have."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.models.tokens.budget import kept_count
from vlm_distill_cache.common.models.tokens.fewer_tokens import selector_of
from vlm_distill_cache.stage2_student.losses.feature_terms import RowsTerm
from vlm_distill_cache.stage2_student.losses.terms import choose_terms


def feeds_fewer(model: Any) -> bool:
    """Whether a student, wrapped or not, chooses which visual tokens it feeds."""
    selector = selector_of(model)
    return selector is not None and selector.settings is not None


def leaves_tokens_out(model: Any, keys: Tensor) -> bool:
    """Whether a student feeds fewer visual tokens of a batch than there are; where not, its losses are those of any other.

    Args:
        keys: As of `fed_shares`.
    """
    selector = selector_of(model)
    if selector is None or selector.settings is None:
        return False
    counts, keep = (keys >= 0).sum(dim=1).tolist(), selector.settings.keep
    merges = selector.settings.merge_frames is not None and any(counts)
    return merges or any(kept_count(keep, count) < count for count in counts if count)


def fed_shares(model: Any, keys: Tensor) -> Tensor | None:
    """What each visual token of the last pass stood for: float32 ``[B, M, M]``, rows that sum to 1, or to 0 if it was not fed.

    Args:
        keys: Positions of visual tokens in the sequence, int64 ``[B, M]``, padding -1.

    Returns:
        None where the model fed all.
    """
    selector = selector_of(model)
    stands_for = selector.decoder.stands_for if selector is not None and selector.settings is not None else None
    if not isinstance(stands_for, Tensor):
        return None
    keys = keys.to(stands_for.device)
    owner = stands_for.gather(1, keys.clamp_min(0)).masked_fill(keys < 0, -1)  # [B, M]
    shares = ((owner[:, None] == keys[:, :, None]) & (keys >= 0)[:, :, None]).to(torch.float32)
    return shares / shares.sum(dim=2, keepdim=True).clamp_min(1.0)


def refuse_fewer_tokens(losses: Iterable[str], where: str) -> None:
    """Refuse losses on what a student says or feels at visual tokens, most of which it does not run.

    Args:
        losses: Names of those that have a weight.

    Raises:
        ConfigError: If there is one.
    """
    refused = [name for name, term in choose_terms(losses).items() if isinstance(term, RowsTerm) and term.at_images]
    if refused:
        raise ConfigError(
            f"{where}: the loss {refused[0]} compares every visual token, and this student feeds only some (visual_tokens); set "
            f"PHASE.losses.{refused[0]}=0 (PHASE: dpt, dft or sft), or visual_tokens=none: logits, hidden and the losses on "
            "attention work with fewer"
        )

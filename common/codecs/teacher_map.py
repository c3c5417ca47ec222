"""A teacher's visual map as losses see it: live or cached, whole or only what the sink-filtered loss needs.

The released loss compares column means over the pairs in which neither side shows an attention sink. The
student's half of that mask is known only while it trains; the teacher's half is a fact about the teacher and
is kept exactly (`kept`), while the values may be coarse. A cache that holds means of kept pairs instead of
single values serves this loss and no other, and says so.

Dims: G layer groups, N rows and columns of the map (visual tokens, or cells of a pooled map).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from vlm_distill_cache.common.errors import CacheMismatchError


@dataclass(frozen=True)
class TeacherMap:
    """Visual maps of a teacher, query rows by key columns; nothing here carries a gradient.

    Attributes:
        values: float32 `[..., N, N]`, probability mass of each pair; where `complete` is False, a mean over
            pairs of the same key column with `kept`, and some positive number for pairs without.
        kept: bool `[..., N, N]`: both tokens carry image and the mass is positive and at most mean + std.
        complete: Whether every value is that of its own pair.
    """

    values: Tensor
    kept: Tensor
    complete: bool = True

    @classmethod
    def from_maps(cls, maps: Tensor, *, token_mask: Tensor | None = None) -> Self:
        """Filter live or fully cached maps.

        Args:
            maps: float `[..., G, N, N]`.
            token_mask: Tokens that carry image, bool `[..., N]` without the group axis. None: all do.
        """
        values = maps.detach().float()
        pairs = image_pairs(values, token_mask)
        # float64: a map of equal values, whose std is 0, must not be all sinks by a rounding of its mean.
        return cls(values, pairs & (values <= sink_threshold(values.double(), pairs)) & (values > 0))

    def to(self, device: torch.device | str) -> "TeacherMap":
        """The same maps on another device."""
        return TeacherMap(self.values.to(device), self.kept.to(device), self.complete)

    def whole(self, wanted_by: str) -> Tensor:
        """All values, float32 `[..., N, N]`.

        Args:
            wanted_by: The loss that needs single values, for the error.

        Raises:
            CacheMismatchError: If the cache does not hold them.
        """
        if not self.complete:
            raise incomplete_map(wanted_by)
        return self.values

    def kept_with(self, student: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """The pairs that neither side's sink filter takes out, bool of the maps' shape; see `mean_columns`."""
        live = student.detach()
        return self.kept & (live <= sink_threshold(live, image_pairs(live, token_mask)))

    def mean_columns(self, student: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each key receives, on average over the pairs that neither side's sink filter takes out.

        Args:
            student: Live maps, float32 of the teacher's shape; the gradient flows through the first result.
            token_mask: As in `from_maps`.

        Returns:
            The student's and the teacher's mean per key column, float32 `[..., N]`; 0 for a column without
            pairs.

        Source:
            CompoDistill's released code (arXiv:2510.12184); docs/method.md, section 3.
        """
        kept = self.kept_with(student, token_mask)
        count = kept.sum(dim=-2).clamp_min(1)
        return (student * kept).sum(dim=-2) / count, (self.values * kept).sum(dim=-2) / count


def incomplete_map(wanted_by: str) -> CacheMismatchError:
    """The error of whoever needs single values of a map that holds means."""
    return CacheMismatchError(
        f"{wanted_by} needs the value of each pair of visual tokens, but the cached visual_map holds only means "
        "over pairs without sinks (preset `blocks` or `compact`), for students with the map's own tokens and "
        "losses.visual_map_kind=sink_filtered. Use these, or build the cache with map_preset=exact, or with "
        "map_grid=SIDE, the side of the student's token grid"
    )


def image_pairs(maps: Tensor, token_mask: Tensor | None) -> Tensor:
    """Pairs of two tokens that carry image.

    Args:
        maps: `[..., G, N, N]`, for its shape.
        token_mask: bool `[..., N]`, without the group axis. None: all tokens carry image.

    Returns:
        bool, of the maps' shape.
    """
    if token_mask is None:
        return torch.ones_like(maps, dtype=torch.bool)
    mask = token_mask.to(maps.device)[..., None, :]  # [..., 1, N]
    return (mask[..., :, None] & mask[..., None, :]).expand(maps.shape)


def sink_threshold(maps: Tensor, pairs: Tensor) -> Tensor:
    """The mass above which a pair is an attention sink: mean + unbiased std over the pairs that count.

    Args:
        maps: float `[..., N, N]`; causal zeros are part of the statistics, as in the released code.
        pairs: bool, the same shape.

    Returns:
        `[..., 1, 1]` in the maps' dtype; without any pair 0.
    """
    count = pairs.sum(dim=(-2, -1), keepdim=True)
    mean = (maps * pairs).sum(dim=(-2, -1), keepdim=True) / count.clamp_min(1)
    squares = ((maps - mean).square() * pairs).sum(dim=(-2, -1), keepdim=True)
    return mean + (squares / (count - 1).clamp_min(1)).sqrt()  # one pair: a std of 0, not NaN

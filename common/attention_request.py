"""Which attention to record in one forward pass.

Dims: B batch, R requested rows, M requested keys, G layer groups.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vlm_distill_cache.common.errors import ModelError


@dataclass(frozen=True)
class AttentionRequest:
    """Which rows, keys and layers to record.

    Attributes:
        rows: int64 ``[B, R]``, query positions in this forward pass; -1 is padding.
        keys: int64 ``[B, M]``, key positions; -1 is padding.
        groups: Language-model layer indices (0-based) of each of G groups; groups may share layers.
        row_weights: Float ``[B, R]``: record the sum of the rows, each times its weight, not the rows. None: the rows.
            Where the same tensors of rows and keys were requested before without weights, the sum is taken of those.

    Raises:
        ModelError: If shapes, dtypes, positions or groups make no sense.
    """

    rows: Tensor
    keys: Tensor
    groups: tuple[tuple[int, ...], ...]
    row_weights: Tensor | None = None

    def __post_init__(self) -> None:
        for name, positions in (("rows", self.rows), ("keys", self.keys)):
            if positions.ndim != 2 or positions.dtype != torch.int64:
                raise ModelError(
                    f"attention request: `{name}` must be int64 [batch, positions], "
                    f"got {positions.dtype} {list(positions.shape)}"
                )
            if positions.numel() and int(positions.min()) < -1:
                raise ModelError(
                    f"attention request: `{name}` holds position {int(positions.min())}; "
                    "positions are 0 or more, and -1 is padding"
                )
        if self.rows.shape[0] != self.keys.shape[0]:
            raise ModelError(
                f"attention request: `rows` are for {self.rows.shape[0]} samples "
                f"but `keys` for {self.keys.shape[0]}; build both from one batch"
            )
        if self.row_weights is not None and self.row_weights.shape != self.rows.shape:
            raise ModelError(
                f"attention request: `row_weights` {list(self.row_weights.shape)} must have the shape of `rows`, "
                f"{list(self.rows.shape)}"
            )
        if not self.groups or any(not group or len(set(group)) != len(group) for group in self.groups):
            raise ModelError(
                f"attention request: `groups` must be tuples of distinct layer indices, got {self.groups}"
            )

    @property
    def layers(self) -> frozenset[int]:
        """All layers that any group needs."""
        return frozenset(layer for group in self.groups for layer in group)

    @cached_property
    def largest(self) -> tuple[int, int]:
        """Largest row and key position: read once, because each read waits for a GPU."""
        return tuple(int(t.max()) if t.numel() else -1 for t in (self.rows, self.keys))  # type: ignore[return-value]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows, keys and weights on a device: copied once, and kept once for all layers."""
        if device not in self._copies:
            with torch.inference_mode(False):  # a later pass, with gradients, may save them
                self._copies[device] = (
                    self.rows.to(device),
                    self.keys.to(device),
                    None if self.row_weights is None else self.row_weights.to(device),
                )
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, Tensor, Tensor | None]]:
        return {}

    def check_fits(self, *, batch: int, queries: int, keys: int) -> None:
        """Raise ModelError unless all positions lie inside the batch that the model runs."""
        if self.rows.shape[0] != batch:
            raise ModelError(
                f"attention request is for {self.rows.shape[0]} samples, but the model runs {batch}; "
                "build the request from the same batch"
            )
        for name, largest, limit in zip(("rows", "keys"), self.largest, (queries, keys), strict=True):
            if largest >= limit:
                raise ModelError(
                    f"attention request: `{name}` holds position {largest}, but the sequence has {limit} "
                    "positions; build the request from the padded batch that the model runs"
                )

"""A teacher's distribution on supervised rows as losses see it, whether it comes live or from a cache.

Listed tokens with their log-probabilities, and the mass of all others at each cached temperature. With that
mass the listed probabilities are exact at these temperatures although the dense logits are gone.

Dims: A supervised rows, K most entries of a row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_distill_cache.common.errors import TemperatureNotCachedError


@dataclass(frozen=True)
class SparseLogits:
    """A teacher's distribution on supervised rows, live or from a cache: losses cannot tell which.

    Attributes:
        token_ids: int64 `[A, K]`, most likely first (a ground truth of low rank last); padding is 0.
        log_probs: float32 `[A, K]`, nats at temperature 1; padding is -inf.
        entry_mask: bool `[A, K]`, True for the first entries of each row, False for padding.
        tail_log_mass: float32 `[A, len(temperatures)]`, nats: log-probability of all tokens not listed;
            -inf where there are none.
        temperatures: Temperatures of the columns of `tail_log_mass`; 1 is among them.
    """

    token_ids: Tensor
    log_probs: Tensor
    entry_mask: Tensor
    tail_log_mass: Tensor
    temperatures: tuple[float, ...]

    def __len__(self) -> int:
        """Number of rows, A."""
        return int(self.token_ids.shape[0])

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The distribution at one of the cached temperatures.

        Args:
            temperature: Dimensionless; one of `temperatures`.

        Returns:
            Log-probabilities of the entries, float32 `[A, K]` in nats, padding -inf; log-mass of all other
            tokens, float32 `[A]`. Together they sum to 1.

        Raises:
            TemperatureNotCachedError: If the tail mass at `temperature` is not known.
        """
        if temperature not in self.temperatures:
            raise TemperatureNotCachedError(
                f"no tail mass at temperature {temperature}: the teacher's signals hold temperatures "
                f"{list(self.temperatures)}; use one of these, or rebuild the cache with "
                f"{temperature} among the temperatures of its logit codec"
            )
        tail = self.tail_log_mass[:, self.temperatures.index(temperature)]  # [A]
        if temperature == 1.0:
            return self.log_probs, tail
        scaled = self.log_probs / temperature
        kept = torch.log(-torch.expm1(tail))  # log of 1 - tail mass; exact at both ends
        normaliser = torch.logsumexp(scaled, dim=1) - kept
        return scaled - normaliser[:, None], tail

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "SparseLogits":
        """The same rows on another device."""
        return SparseLogits(
            self.token_ids.to(device, non_blocking=non_blocking),
            self.log_probs.to(device, non_blocking=non_blocking),
            self.entry_mask.to(device, non_blocking=non_blocking),
            self.tail_log_mass.to(device, non_blocking=non_blocking),
            self.temperatures,
        )

    @staticmethod
    def cat(parts: "list[SparseLogits]") -> "SparseLogits":
        """Rows of all parts in order, padded to the widest.

        Raises:
            ValueError: If there are no parts, or they differ in temperatures.
        """
        if not parts or any(part.temperatures != parts[0].temperatures for part in parts):
            found = sorted({part.temperatures for part in parts})
            raise ValueError(f"cat needs at least one part and equal temperatures, got {found}")
        width = max(part.token_ids.shape[1] for part in parts)

        def joined(name: str, fill: float) -> Tensor:
            tensors = [getattr(part, name) for part in parts]
            return torch.cat([_pad_columns(tensor, width, fill) for tensor in tensors])

        return SparseLogits(
            joined("token_ids", 0),
            joined("log_probs", -math.inf),
            joined("entry_mask", False),
            torch.cat([part.tail_log_mass for part in parts]),
            parts[0].temperatures,
        )


def _pad_columns(tensor: Tensor, width: int, fill: float) -> Tensor:
    if tensor.shape[1] == width:
        return tensor
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)

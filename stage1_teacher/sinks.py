"""Which visual tokens act as attention sinks: those that attract attention in most pictures, whatever these show.

A token is a sink of a picture if it receives more than mean + one standard deviation of what the tokens that
carry image receive: the released loss's threshold, on received attention instead of single pairs. A teacher whose
sinks lie at the same places in every picture says there little about the picture; the ``relative`` answer loss
and the sink-filtered map loss take them out.

Source:
    CompoDistill's released filter (arXiv 2510.12184); visual attention sinks: arXiv 2503.03321.

Dims: N tokens or cells.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_PLACES = 5
COMMON_SHARE = 0.5
"""A place is named if it is a sink in at least this share of the pictures."""


@dataclass
class SinkCount:
    """Sinks of one signal over some pictures, kept as long as all have equally laid-out tokens.

    Attributes:
        columns: Columns of the tokens' grid, to name places by row and column; 0: by number.
        pictures: How many were added.
        sinks: How many tokens of them were sinks.
        mass: Sum over pictures of the share of received attention that went to sinks.
        often: In how many pictures each token was a sink, float64 ``[N]``; None before the first, and once layouts
            differ.
    """

    columns: int = 0
    pictures: int = 0
    sinks: int = 0
    mass: float = 0.0
    often: Tensor | None = field(default=None)
    mixed: bool = False

    def add(self, received: Tensor, content: Tensor) -> None:
        """Count one picture.

        Args:
            received: What each token receives, float ``[N]``, at least 0.
            content: Which tokens carry image, bool ``[N]``.
        """
        values = received.double()
        inside = values[content]
        if len(inside) < 2 or not bool(inside.any()):
            return
        found = content & (values > inside.mean() + inside.std())
        self.pictures += 1
        self.sinks += int(found.sum())
        self.mass += float(values[found].sum() / inside.sum())
        if self.often is not None and len(self.often) != len(found):
            self.mixed = True
        if self.mixed:
            self.often = None
            return
        self.often = found.double() if self.often is None else self.often + found

    def figures(self, signal: str) -> dict[str, float | str]:
        """What the fidelity card says: sinks a picture, their share of the attention, and where they keep lying.

        Args:
            signal: Names the figures.
        """
        if not self.pictures:
            return {}
        figures: dict[str, float | str] = {
            f"{signal}_sinks_per_picture": float(f"{self.sinks / self.pictures:.6g}"),
            f"{signal}_sink_mass": float(f"{self.mass / self.pictures:.6g}"),
        }
        if self.often is not None:
            figures[f"{signal}_sink_places"] = self._places() or "none in half of the pictures"
        return figures

    def _places(self) -> str:
        assert self.often is not None
        share = self.often / self.pictures
        order = torch.argsort(share, descending=True, stable=True)[:MOST_PLACES].tolist()
        return "; ".join(
            f"{self._name(token)} in {100 * float(share[token]):.0f} %"
            for token in order
            if float(share[token]) >= COMMON_SHARE
        )

    def _name(self, token: int) -> str:
        return (
            f"row {token // self.columns + 1} column {token % self.columns + 1}"
            if self.columns
            else f"token {token + 1}"
        )

"""What a student scores with weights of 8 or 4 bits, beside what it scores with its own: option, JSON and lines. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import click

from vlm_distill_cache.common.printing import size_words
from vlm_distill_cache.stage2_student.scores.results import HEADLINE, PAIRED, EvaluationReport, format_score, gain_of

Quantisation = Literal["8bit", "4bit"]
QUANTISATIONS: tuple[Quantisation, ...] = ("8bit", "4bit")
WRITTEN = ("weight_bytes", "quantised")
"""What a file of scores has more with them."""


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """Scores with quantised weights; bytes are of all weights on disk, of such an export and of the student itself."""

    report: EvaluationReport
    weight_bytes: int
    own_bytes: int

    def gains(self, before: EvaluationReport) -> dict[str, Any]:
        """What it scores more than the student itself, item by item, by the names of scores that are kept so."""
        found = {name: gain_of(self.report, before, name) for name in PAIRED}
        return {name: gain for name, gain in found.items() if gain is not None}


def _kinds(_context: click.Context, _option: click.Parameter, given: str | None) -> list[Quantisation]:
    """What the option names, each once."""
    words = (given or "").lower().replace(",", " ").split()
    if given is not None and (not words or not {*words} <= {*QUANTISATIONS}):
        raise click.BadParameter(f"{given!r} is not {', '.join(QUANTISATIONS)}, or both with a comma between them.")
    return [kind for kind in QUANTISATIONS if kind in words]


quantise_option = click.option(
    "--quantise",
    metavar="8bit,4bit",
    callback=_kinds,
    help="Score it with the language model's weights so quantised, too, as `export --quantise` does, on the same items.",
)


def reports_of(quantised: Mapping[str, Quantised]) -> dict[str, EvaluationReport]:
    """The scores alone."""
    return {kind: found.report for kind, found in quantised.items()}


def quantised_values(report: EvaluationReport, quantised: Mapping[str, Quantised]) -> dict[str, Any]:
    """JSON beside a student's own scores, keys as in `WRITTEN`; empty if nothing was quantised."""
    if not quantised:
        return {}
    values = {
        kind: {
            "weight_bytes": found.weight_bytes,
            **found.report.to_dict(),
            "differences": {name: gain.to_dict() for name, gain in found.gains(report).items()},
        }
        for kind, found in quantised.items()
    }
    return dict(zip(WRITTEN, (next(iter(quantised.values())).own_bytes, values), strict=True))


def quantised_lines(report: EvaluationReport, quantised: Mapping[str, Quantised]) -> list[str]:
    """What fewer bits cost, a line each: bytes, and the difference to the student's own scores with its 95 % interval."""
    lines = []
    for kind, found in quantised.items():
        gains = found.gains(report)
        changes = [
            f"{heading} {' '.join(format_score(gains[name], factor, sign='+')).rstrip()}"
            for name, heading, factor in HEADLINE
            if name in gains
        ]
        size = f"weights {size_words(found.weight_bytes)} of {size_words(found.own_bytes)}"
        lines.append(
            "; ".join([f"{kind}: {size}", *(["difference item by item: " + ", ".join(changes)] if changes else [])])
        )
    return lines

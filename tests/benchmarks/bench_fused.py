"""Fused against unfused losses, time and memory, forward and backward: ``python -m tests.benchmarks.bench_fused``.

Time is the median over interleaved repetitions on one core, with rows that fit this machine. Memory is counted, not
measured: bytes of live tensors at 4,096 rows on the ``meta`` device, with the chunks that a CPU or a GPU would get.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from tests.benchmarks.bench_measure import Spread, Values, paired_seconds, ratio
from vlm_distill_cache.common.codecs.live import SparseLogits, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.stage2_student.losses import fused
from vlm_distill_cache.stage2_student.losses.fused import CHUNK_BYTES, fused_losses
from vlm_distill_cache.stage2_student.losses.logits import lm_loss, tail_bucket_loss
from vlm_distill_cache.stage2_student.training.live_bytes import LiveBytes

ROWS = 4096
"""Of the memory count."""


@dataclass(frozen=True)
class Case:
    """One student's output layer; those ``in_table`` are part of ``make bench``, all of this file's own table."""

    name: str
    rows: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    trained: bool = True
    temperature: float = 1.0
    in_table: bool = False


TIMED = (
    Case("V = 32k, float32", 512, 512, 32_000, torch.float32, in_table=True),
    Case("V = 32k, bfloat16", 64, 512, 32_000, torch.bfloat16, in_table=True),  # few rows: slow without hardware for it
    Case("V = 32k, float32, frozen head", 512, 512, 32_000, torch.float32, trained=False),
    Case("V = 32k, float32, temperature 2", 512, 512, 32_000, torch.float32, temperature=2.0),
    Case("V = 32k, float32, D = 2048", 256, 2048, 32_000, torch.float32),
    Case("V = 152k, float32", 256, 256, 152_000, torch.float32, in_table=True),
    Case("V = 152k, bfloat16", 64, 256, 152_000, torch.bfloat16),
)
COUNTED = (
    Case("V = 32k, D = 2048, bfloat16", ROWS, 2048, 32_000, torch.bfloat16, in_table=True),
    Case("V = 152k, D = 256, float32", ROWS, 256, 152_000, torch.float32),
    Case("V = 152k, D = 2048, float32", ROWS, 2048, 152_000, torch.float32, in_table=True),
    Case("V = 152k, D = 2048, bfloat16", ROWS, 2048, 152_000, torch.bfloat16, in_table=True),
    Case("V = 152k, D = 2048, bfloat16, frozen head", ROWS, 2048, 152_000, torch.bfloat16, trained=False),
)


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher: SparseLogits

    def naive(self, temperature: float) -> None:
        """Logits of all rows at once."""
        logits = self.hidden @ self.weight.t()
        total = lm_loss(logits, self.labels) + tail_bucket_loss(logits, self.teacher, temperature=temperature)
        total.backward()

    def fused(self, temperature: float, chunk_rows: int | None = None) -> None:
        """The same in chunks."""
        fused_losses(
            self.hidden,
            self.weight,
            self.labels,
            self.teacher,
            temperature=temperature,
            chunk_rows=chunk_rows,
        ).total.backward()

    def clear(self) -> None:
        """No gradients: accumulating them costs both sides the same."""
        self.hidden.grad = self.weight.grad = None


def make(case: Case, device: str = "cpu") -> Inputs:
    """Random hidden states; a teacher of 32 entries a row."""
    torch.manual_seed(0)
    hidden = torch.randn(case.rows, case.width, device=device, dtype=case.dtype, requires_grad=True)
    weight = torch.randn(case.vocabulary, case.width, device=device, dtype=case.dtype) * case.width**-0.5
    labels = torch.randint(0, case.vocabulary, (case.rows,), device=device)
    if device == "meta":
        ids = torch.empty(case.rows, 32, dtype=torch.int64, device=device)
        tail = torch.empty(case.rows, 2, device=device)
        teacher = SparseLogits(ids, torch.empty(case.rows, 32, device=device), ids > 0, tail, (1.0, 2.0))
    else:
        codec = LogitCodec.from_preset("fixed:32")
        parts = [select_entries(codec, 4 * torch.randn(len(part), case.vocabulary), part) for part in labels.split(64)]
        teacher = SparseLogits.cat(parts)
    return Inputs(hidden, weight.requires_grad_(case.trained), labels, teacher)


def time_ratio(case: Case, *, rounds: int) -> tuple[Spread, Spread]:
    """Fused / naive of paired repetitions, and the naive form's milliseconds."""
    inputs = make(case)
    seconds = paired_seconds(
        {"naive": lambda: inputs.naive(case.temperature), "fused": lambda: inputs.fused(case.temperature)},
        rounds=rounds,
        before=inputs.clear,
    )
    return ratio(seconds["fused"], seconds["naive"]), Spread.of(1e3 * spent for spent in seconds["naive"])


def peak_bytes(case: Case, *, chunks_of: str | None) -> int:
    """Most bytes alive beyond the inputs; ``chunks_of`` a kind of device, or None for the naive form."""
    inputs = make(case, "meta")
    budget = {"cpu": CHUNK_BYTES["cpu" if chunks_of is None else chunks_of]}
    with mock.patch.object(fused, "CHUNK_BYTES", budget), LiveBytes(inputs.hidden, inputs.weight) as live:
        inputs.naive(case.temperature) if chunks_of is None else inputs.fused(case.temperature)
    return int(live.peak)


def bench_fused(*, every_case: bool = False, rounds: int = 7) -> tuple[Values, Values]:
    """Ratios and figures, by name.

    Args:
        every_case: Not only those of ``make bench``.
        rounds: Of each timing.
    """
    ratios: Values = {}
    figures: Values = {}
    for case in (case for case in TIMED if case.in_table or every_case):
        size = f"{case.rows} rows, D = {case.width}"
        fused_to_naive, naive = time_ratio(case, rounds=rounds)
        ratios[f"fused loss, time / naive: {case.name} ({size})"] = fused_to_naive
        figures[f"naive loss, ms: {case.name} ({size})"] = naive
    for case in (case for case in COUNTED if case.in_table or every_case):
        naive_bytes = peak_bytes(case, chunks_of=None)
        for device in CHUNK_BYTES:
            name = f"fused loss, peak bytes / naive: {case.name}, {device} chunks ({ROWS} rows)"
            ratios[name] = peak_bytes(case, chunks_of=device) / naive_bytes
        figures[f"naive loss, peak GB: {case.name} ({ROWS} rows)"] = naive_bytes / 1e9
    return ratios, figures


def main() -> None:
    """Print a table, or JSON with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ratios, figures = bench_fused(every_case=True)
    if arguments.json:
        sys.stdout.write(json.dumps({"ratios": ratios, "figures": figures}, indent=1) + "\n")
        return
    for name, value in (ratios | figures).items():
        shown = value if isinstance(value, float) else value.median
        sys.stdout.write(f"| {name} | {shown:.3g} |\n")


if __name__ == "__main__":
    main()

"""The fidelity card: what the cache lost against the live teacher, measured on a probe.

Stage one runs the probe's samples through the teacher again and compares the dense truth with what the cache
decodes to. Gradient errors need a student: a stand-in whose logits are the teacher's plus unit Gaussian
noise, and whose attention is the teacher's flattened by a square root. A control compares the teacher with
itself, run twice, so that a reader can tell codec loss from hardware noise.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.codecs.logits import SparseLogits
from common.codecs.row_attention import RowAttention
from common.errors import SampleError
from common.manifest import Plan
from common.sidecar import read_sidecar
from common.stores import open_reader
from common.visual_tokens import Tile
from data.collate import Batch, collate
from stage1_teacher.plan import Build
from stage1_teacher.signals import TeacherSignals, reduce_output, to_cpu, visual_columns
from stage1_teacher.teacher import TeacherOutput


def measure_fidelity(work: Build, cache_dir: Path, *, samples: int) -> dict[str, Any] | None:
    """Compare the decoded cache with the live teacher on samples spread evenly over the data.

    Args:
        work: What the cache was built with.
        cache_dir: The cache; all its shards must be there.
        samples: Size of the probe; 0 skips it.

    Returns:
        Means over the probe's rows or samples by name; None if skipped. Units: ``*_kl`` nats a row, ``kept_mass``
        and ``rows_at_cap`` shares, ``*_gradient_error`` relative L2, ``*_gradient_cosine`` dimensionless.
    """
    if not samples:
        return None
    totals = Totals()
    step = max(1, len(work.dataset) // samples)
    positions = list(range(0, len(work.dataset), step))[:samples]
    for position in positions:
        try:
            encoded = work.encoder(work.dataset[position])
        except SampleError:
            continue
        batch = collate([encoded], work.teacher.pad_token_id)
        record = _read_record(cache_dir, work.plan, position, encoded.sample_id)
        if record is None:
            continue
        first, second = (_run(work, batch) for _ in range(2))
        _compare(totals, work.codecs, record, encoded.tiles, first, second)
    return {"samples": totals.samples, **totals.means()}


class Totals:
    """Sums of figures weighted by their rows."""

    def __init__(self) -> None:
        """Start empty."""
        self.samples = 0
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, value: float, weight: float) -> None:
        """Add ``weight`` observations whose mean is ``value``."""
        total, count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value * weight, count + weight)

    def means(self) -> dict[str, float]:
        """Weighted means, rounded to 6 significant digits so that the card is readable."""
        return {
            name: float(f"{total / count:.6g}")
            for name, (total, count) in sorted(self._sums.items())
            if count
        }


def _run(work: Build, batch: Batch) -> tuple[TeacherOutput, TeacherSignals]:
    output = work.run(batch)
    return output, to_cpu(reduce_output(output, batch, work.codecs))


def _read_record(cache_dir: Path, plan: Plan, position: int, sample_id: str) -> Any:
    index = position // plan.shard_size
    sidecar = read_sidecar(cache_dir, index)
    if sample_id not in sidecar.sample_ids:
        return None
    reader = open_reader(plan.store, cache_dir, index, plan.all_fields)
    try:
        return reader.read(reader.sample_ids.index(sample_id))
    finally:
        reader.close()


def _compare(
    totals: Totals,
    codecs: Mapping[str, Any],
    record: Any,
    tiles: tuple[Tile, ...],
    first: tuple[TeacherOutput, TeacherSignals],
    second: tuple[TeacherOutput, TeacherSignals],
) -> None:
    output, signals = first
    again_output, again = second
    totals.samples += 1
    rows = len(output.labels)
    if "logits" in codecs and rows:
        _compare_logits(totals, codecs["logits"], record, output, again_output)
    if "answer_attention" in codecs and rows and bool(signals.answer_attention[0].any()):
        live, cached = signals.answer_attention[0], codecs["answer_attention"].decode(record)
        student = live.sqrt()
        totals.add("answer_attention_gradient_cosine", _row_cosine(cached, live, student), rows)
        control = RowAttention.from_cells(again.answer_attention[0])
        totals.add("control_answer_attention_gradient_cosine", _row_cosine(control, live, student), rows)
    for name in ("visual_map", "visual_columns"):
        if name in codecs and output.visual_counts[0]:
            live = signals.visual_map[0]
            if name == "visual_columns":
                live = visual_columns(live, tiles)
            if not bool(live.any()):  # the picture lies wholly in tokens that count as padding
                continue
            decoded = codecs[name].decode(record)
            totals.add(
                f"{name}_cosine", float(F.cosine_similarity(decoded.flatten(), live.flatten(), dim=0)), 1
            )


def _compare_logits(
    totals: Totals, codec: Any, record: Any, output: TeacherOutput, again: TeacherOutput
) -> None:
    dense = F.log_softmax(output.logits.float().cpu(), dim=-1)  # [A, V], nats
    dense_again = F.log_softmax(again.logits.float().cpu(), dim=-1)
    sparse: SparseLogits = codec.decode(record)
    rows = len(dense)
    noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
    student = F.softmax(dense + noise, dim=-1)
    approximation = reconstruct(sparse, student.log())
    exact_gradient = student - dense.exp()
    error = (student - approximation.exp() - exact_gradient).norm() / exact_gradient.norm().clamp_min(1e-12)
    control = (dense_again.exp() - dense.exp()).norm() / exact_gradient.norm().clamp_min(1e-12)
    kept = sparse.log_probs.exp().sum(-1)
    totals.add("logits_gradient_error", float(error), rows)
    totals.add("control_logits_gradient_error", float(control), rows)
    totals.add("logits_kl", float((dense.exp() * (dense - approximation)).sum(-1).mean()), rows)
    totals.add("kept_mass", float(kept.clamp(max=1.0).mean()), rows)
    totals.add("entries_per_row", float(sparse.entry_mask.sum(-1).float().mean()), rows)
    totals.add("rows_at_cap", float((sparse.entry_mask.sum(-1) >= codec.max_k).float().mean()), rows)


def reconstruct(sparse: SparseLogits, student_log_probs: Tensor) -> Tensor:
    """Dense log-probabilities the tail-bucket loss behaves as if it had: the tail is spread as the student's.

    Args:
        sparse: Decoded rows at temperature 1.
        student_log_probs: The student's, float32 ``[A, V]``, nats.

    Returns:
        float32 ``[A, V]``, nats.

    Source:
        The gradient of method.md, section 2: outside the top-k it is q_j * (1 - eps_T / eps_S).
    """
    log_probs, tail = sparse.at(1.0)
    inside = torch.zeros_like(student_log_probs, dtype=torch.bool)
    rows, entries = sparse.entry_mask.nonzero(as_tuple=True)
    inside[rows, sparse.token_ids[rows, entries]] = True
    student_tail = student_log_probs.masked_fill(inside, -torch.inf).logsumexp(-1)  # [A]
    spread = student_log_probs + (tail - student_tail).nan_to_num(nan=-torch.inf)[:, None]
    dense = torch.where(inside, torch.full_like(spread, -torch.inf), spread)
    dense[rows, sparse.token_ids[rows, entries]] = log_probs[rows, entries]
    return dense.clamp_min(-80.0)


def _row_cosine(cached: RowAttention, live: Tensor, student: Tensor) -> float:
    """Cosine of the row-wise KL's gradient on student cells, cached against live, mean over rows."""
    live_mass = live.sum(-1, keepdim=True).clamp_min(1e-12)
    cached_mass = cached.image_mass[..., None].clamp_min(1e-12)
    weights = student / student.sum(-1, keepdim=True).clamp_min(1e-12)
    exact = live_mass * (weights - live / live_mass)
    approximate = cached_mass * (weights - cached.cells / cached_mass)
    return float(F.cosine_similarity(approximate.flatten(1), exact.flatten(1), dim=1).mean())

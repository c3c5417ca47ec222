"""The fidelity card: what the cache lost against the live teacher, measured on a probe.

Stage one runs the probe's samples through the teacher again and compares the dense truth with what the cache
decodes to. Gradient errors need a student: a stand-in whose logits are the teacher's plus unit Gaussian
noise, and whose attention is the teacher's flattened by a square root. A control compares the teacher with
itself, run twice, so that a reader can tell codec loss from hardware noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_distill_cache.common.attention.boxes import content_mask, tile_boxes
from vlm_distill_cache.common.attention.tiles import Tile, of_view, views_of
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.cache.shared_images import SharedImages
from vlm_distill_cache.common.cache.side_files import check_file
from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.cache.stores import open_reader
from vlm_distill_cache.common.codecs.description import Codec
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec
from vlm_distill_cache.common.codecs.live import (
    RowAttention,
    SparseLogits,
    TeacherMap,
    as_tensors,
    image_pairs,
    pool_map,
)
from vlm_distill_cache.common.codecs.logits import LogitCodec, VisualLogitsCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.sample import Sample, with_answers
from vlm_distill_cache.data.text.collate import Batch, collate
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.loop.answers import ANSWERS
from vlm_distill_cache.stage1_teacher.loop.signals import reduce_output, to_cpu, view_slices
from vlm_distill_cache.stage1_teacher.loop.work import Build

MOST_PLACES = 5
COMMON_SHARE = 0.5
"""A place is named if it is a sink in at least this share of the pictures."""


@dataclass
class SinkCount:
    """Sinks of one signal over some pictures, kept as long as all have equally laid-out tokens.

    Attributes:
        columns: Columns of the tokens' grid, to name places by row and column; 0: by number.
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
        """What the fidelity card says: sinks a picture, their share of the attention, and their usual places."""
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


def row_gradient_cosines(cached: RowAttention, live: Tensor, student: Tensor) -> Tensor:
    """Cosine of the row-wise KL's gradient on the student's cells, cached against live.

    Args:
        live: The teacher's cells, float32 `[A, G, C]`.

    Returns:
        float32 `[A]`; 0 for a row that does not look at the image.
    """
    live_mass = live.sum(-1, keepdim=True).clamp_min(1e-12)
    cached_mass = cached.image_mass[..., None].clamp_min(1e-12)
    weights = student / student.sum(-1, keepdim=True).clamp_min(1e-12)
    exact = live_mass * (weights - live / live_mass)
    approximate = cached_mass * (weights - cached.cells / cached_mass)
    return F.cosine_similarity(approximate.flatten(1), exact.flatten(1), dim=1)


def column_gradient_cosine(cached: Tensor, live: Tensor) -> float:
    """Cosine of the gradient of 1 - cos of column means, cached against live.

    Args:
        cached: Decoded columns, float32 `[G, N]`.
        live: The teacher's.
    """
    gradients = []
    for teacher in (live, cached):
        student = live.sqrt().requires_grad_()
        (1 - F.cosine_similarity(student, teacher, dim=-1)).sum().backward()
        assert student.grad is not None
        gradients.append(student.grad.nan_to_num())
    return _cosine(*gradients)


def map_gradients(teacher: TeacherMap, student: Tensor, content: Tensor | None) -> dict[str, Tensor]:
    """Gradients of the losses that a teacher's map can serve.

    Args:
        teacher: Live or decoded, `[G, N, N]`.
        student: The stand-in's maps, float32 `[G, N, N]`.
        content: Cells that carry image, bool `[N]`. None: all do.

    Returns:
        `sink_filtered` and, if the map is complete, `cosine`: float32 `[G, N, N]`.
    """
    losses = ["sink_filtered", "cosine"] if teacher.complete else ["sink_filtered"]
    gradients = {}
    for loss in losses:
        leaf = student.detach().clone().requires_grad_()
        whole = loss == "cosine"
        left, right = (leaf, teacher.values) if whole else teacher.mean_columns(leaf, content)
        (1 - F.cosine_similarity(left.flatten(1), right.flatten(1), dim=-1)).sum().backward()
        assert leaf.grad is not None
        gradients[loss] = leaf.grad
    return gradients


def map_gradient_cosines(
    cached: TeacherMap, live: Tensor, content: Tensor | None, *, student: Tensor | None = None
) -> dict[str, float]:
    """Cosine of each loss's gradient with the one of the live map.

    Args:
        live: The teacher's, float32 `[G, N, N]`, on the same cells.
        content: Cells that carry image, bool `[N]`. None: all do.
        student: Maps of a student; None: the stand-in.

    Returns:
        By loss; without those that the cached map cannot serve, or that give no gradient.
    """
    if student is None:
        student = live.sqrt()
    exact = map_gradients(TeacherMap.from_maps(live, token_mask=content), student, content)
    found = map_gradients(cached, student, content)
    return {loss: _cosine(found[loss], exact[loss]) for loss in found if bool(exact[loss].any())}


def _cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of two tensors as vectors, in float64."""
    return float(F.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0))


_REMEDY = "run `cachectl verify`, then `cachectl repair` and build the shard again"
CONTROL_BATCH = 8
"""Most copies of a sample in the control's batch."""


def measure_fidelity(work: Build, cache_dir: Path, *, samples: int) -> dict[str, Any] | None:
    """Compare the decoded cache with the live teacher on samples spread evenly over the data.

    Args:
        cache_dir: The cache; all its shards must be there.
        samples: Size of the probe; 0 skips it.

    Returns:
        Means over the probe's rows or samples by name, and for attention the ``*_worst`` row or sample; None if
        skipped. Units: ``*_kl`` nats a row, ``kept_mass`` and ``rows_at_cap`` shares, ``*_gradient_error`` relative
        L2, ``*_cosine`` dimensionless. ``visual_map_gradient_cosine`` is that of the sink-filtered loss,
        ``visual_map_plain_gradient_cosine`` that of the whole map's cosine. ``*_sinks_per_picture``, ``*_sink_mass`` and
        ``*_sink_places`` say where the teacher's attention sinks lie; ``visual_map_sink_pairs``
        and ``visual_map_sink_mass`` what the released filter removes of the teacher's pairs and of their mass.

    Raises:
        CacheFormatError: If a file of the probed shards is lost or damaged.
    """
    if not samples:
        return None
    totals = Totals()
    step = max(1, len(work.dataset) // samples)
    positions = list(range(0, len(work.dataset), step))[:samples]
    for index in sorted({position // work.plan.shard_size for position in positions}):
        # A damaged shard would give figures of its damage; a build may have found it finished by an earlier run.
        for name, entry in read_sidecar(cache_dir, index).files.items():
            check_file(cache_dir, name, entry, _REMEDY)
    for position in positions:
        try:
            encoded = work.encoder(_as_cached(work, cache_dir, position))
        except SampleError:
            continue
        alone = collate([encoded], work.teacher.pad_token_id)
        record = _read_record(cache_dir, work.plan, position, encoded.sample_id)
        if record is None:
            continue
        rows = len(encoded.supervised_rows)
        seen = Seen(record, encoded.tiles, _run(work, alone, rows), _control(work, encoded, rows), totals)
        totals.samples += 1
        for codec in work.codecs.values():
            compare(codec, seen)
    return {"samples": totals.samples, **totals.means(), **totals.sink_figures()}


def _as_cached(work: Build, cache_dir: Path, position: int) -> Sample:
    """A sample with the answers that its record belongs to: the data set's, or those that the teacher wrote."""
    sample = work.dataset[position]
    if ANSWERS not in work.codecs:
        return sample
    record = _read_record(cache_dir, work.plan, position, sample.sample_id)
    if record is None:
        raise SampleError(f"sample {sample.sample_id!r} is not in the cache")
    return with_answers(sample, work.codecs[ANSWERS].decode(record))


class Totals:
    """Sums of figures weighted by their rows."""

    def __init__(self) -> None:
        """Start empty."""
        self.samples = 0
        self.sinks: dict[str, SinkCount] = {}
        self._sums: dict[str, tuple[float, float]] = {}
        self._worst: dict[str, float] = {}

    def add(self, name: str, value: float, weight: float) -> None:
        """Add ``weight`` observations whose mean is ``value``."""
        total, count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value * weight, count + weight)

    def add_cosines(self, name: str, values: list[float]) -> None:
        """Add cosines whose mean and whose lowest, ``<name>_worst``, are wanted."""
        for value in values:
            self.add(name, value, 1)
            self._worst[f"{name}_worst"] = min(value, self._worst.get(f"{name}_worst", value))

    def sink_figures(self) -> dict[str, float | str]:
        """Where the teacher's attention sinks lie, by signal."""
        figures: dict[str, float | str] = {}
        for signal, count in sorted(self.sinks.items()):
            figures |= count.figures(signal)
        return figures

    def means(self) -> dict[str, float]:
        """Weighted means, and lowest cosines, rounded to 6 significant digits so that the card is readable."""
        figures = {name: total / count for name, (total, count) in self._sums.items() if count}
        return {name: float(f"{value:.6g}") for name, value in sorted((figures | self._worst).items())}


@dataclass(frozen=True)
class Found:
    """What one pass says of the first sample of its batch.

    Attributes:
        dense: Logits of its rows by signal, ``[A, V]``; what else the teacher found is left on its device.
        signals: As the cache's codecs would be given them.
        logs: Their log-probabilities on the CPU, once they were asked for.
    """

    dense: Mapping[str, Tensor]
    signals: Mapping[str, Any]
    logs: dict[str, Tensor] = field(default_factory=dict)

    def log_probs(self, signal: str) -> Tensor:
        """Dense log-probabilities of its rows, float32 ``[A, V]``, nats."""
        if signal not in self.logs:
            self.logs[signal] = F.log_softmax(self.dense[signal].float().cpu(), dim=-1)
        return self.logs[signal]

    def stand_in(self, signal: str) -> tuple[Tensor, Tensor]:
        """The stand-in student's probabilities, and the gradient that it gets from the dense rows: float32 ``[A, V]`` each."""
        name = f"{signal} of the student"
        if name not in self.logs:
            dense = self.log_probs(signal)
            noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
            self.logs[name] = F.softmax(dense + noise, dim=-1)
        return self.logs[name], self.logs[name] - self.log_probs(signal).exp()


@dataclass(frozen=True)
class Seen:
    """One sample of the probe: its record, what the teacher says of it twice, and where figures go."""

    record: Record
    tiles: tuple[Tile, ...]
    first: Found
    second: Found
    totals: Totals


def _control(work: Build, encoded: EncodedSample, rows: int) -> Found:
    """A sample again, in a batch, whose sums are formed in another order: the control carries that noise."""
    copies = min(work.plan.batch_size, CONTROL_BATCH)
    while True:
        try:
            return _run(work, collate([encoded] * copies, work.teacher.pad_token_id), rows)
        except torch.OutOfMemoryError:
            if copies == 1:
                raise
        copies //= 2


def _run(work: Build, batch: Batch, rows: int) -> Found:
    output = work.run(batch)
    return first_sample(output, to_cpu(reduce_output(output, batch, work.codecs)), rows)


def first_sample(output: Mapping[str, Tensor], signals: Mapping[str, Any], rows: int) -> Found:
    """What a batch of copies says of its first."""
    own = {
        name: live.rows(slice(0, rows)) if isinstance(live, SparseLogits) else live[0] for name, live in signals.items()
    }
    return Found({name: found[:rows] for name, found in output.items() if found.ndim == 2}, own)


def _read_record(cache_dir: Path, plan: Plan, position: int, sample_id: str) -> Any:
    index = position // plan.shard_size
    sidecar = read_sidecar(cache_dir, index)
    if sample_id not in sidecar.sample_ids:
        return None
    reader = open_reader(plan.store, cache_dir, index, plan.all_fields)
    try:
        images = SharedImages(plan.all_fields)
        return images.read(reader, reader.sample_ids.index(sample_id), where=f"{cache_dir}, sample {sample_id!r}")
    finally:
        reader.close()


@singledispatch
def compare(codec: Codec, seen: Seen) -> None:
    """Add the figures of one signal of one sample; those without any have no function below."""


@compare.register
def _(codec: VisualLogitsCodec, seen: Seen) -> None:
    return


@compare.register
def _(codec: LogitCodec, seen: Seen) -> None:
    dense, dense_again = (found.log_probs(codec.signal) for found in (seen.first, seen.second))  # [A, V], nats
    rows, totals = len(dense), seen.totals
    if not rows:
        return
    sparse = as_tensors(codec.decode(seen.record))
    student, exact_gradient = seen.first.stand_in(codec.signal)
    approximation = reconstruct(sparse, student.log())
    error = (student - approximation.exp() - exact_gradient).norm() / exact_gradient.norm().clamp_min(1e-12)
    control = torch.zeros(())
    if seen.second is not seen.first:  # which costs a third of all of this
        control = (dense_again.exp() - dense.exp()).norm() / exact_gradient.norm().clamp_min(1e-12)
    kept = sparse.log_probs.exp().sum(-1)
    totals.add(f"{codec.signal}_gradient_error", float(error), rows)
    totals.add(f"control_{codec.signal}_gradient_error", float(control), rows)
    totals.add(f"{codec.signal}_kl", float((dense.exp() * (dense - approximation)).sum(-1).mean()), rows)
    totals.add("kept_mass", float(kept.clamp(max=1.0).mean()), rows)
    totals.add("entries_per_row", float(sparse.entry_mask.sum(-1).float().mean()), rows)
    totals.add("rows_at_cap", float((sparse.entry_mask.sum(-1) >= codec.max_k).float().mean()), rows)


@compare.register
def _(codec: RowAttentionCodec, seen: Seen) -> None:
    name = codec.signal
    live, again = seen.first.signals[name], seen.second.signals[name]
    if not bool(live.any()):
        return
    if not isinstance(codec, TextAttentionCodec):
        sinks = seen.totals.sinks.setdefault(name, SinkCount(columns=codec.grid[1]))
        grids = codec.cells_of(seen.tiles)
        for grid, cells in zip(grids, live.mean(dim=(0, 1)).split([grid.token_count for grid in grids]), strict=True):
            if (grid.rows, grid.cols) == codec.grid:
                sinks.add(cells, torch.ones_like(cells, dtype=torch.bool))
    student = live.sqrt()
    looking = live.flatten(1).any(dim=1)  # a row that does not look has no gradient to compare
    for prefix, found in (("", as_tensors(codec.decode(seen.record))), ("control_", RowAttention.from_cells(again))):
        cosines = row_gradient_cosines(found, live, student)[looking]
        seen.totals.add_cosines(f"{prefix}{name}_gradient_cosine", cosines.tolist())


@compare.register
def _(codec: HiddenCodec, seen: Seen) -> None:
    live, again = (found.signals[codec.signal].float() for found in (seen.first, seen.second))
    size = float(live.norm())
    if size:
        for prefix, found in (("", as_tensors(codec.decode(seen.record))), ("control_", again)):
            seen.totals.add(f"{prefix}{codec.signal}_error", float((found - live).norm()) / size, 1)


@compare.register
def _(codec: VisualColumnsCodec, seen: Seen) -> None:
    name, totals = codec.signal, seen.totals
    columns, again = seen.first.signals[name], seen.second.signals[name]
    if not bool(columns.any()):  # a picture that lies wholly in padding tokens
        return
    cached = as_tensors(codec.decode(seen.record))
    for view, own in zip(views_of(seen.tiles), view_slices(seen.tiles), strict=True):
        tiles, of_view_ = of_view(seen.tiles, view), columns[:, own]
        if not bool(of_view_.any()):
            continue
        side = tiles[0].cols if len(tiles) == 1 else 0
        count = totals.sinks.setdefault(name, SinkCount(columns=side))
        count.add(of_view_.mean(dim=0), content_mask(tile_boxes(tiles)))
        cosine = F.cosine_similarity(cached[:, own].flatten(), of_view_.flatten(), dim=0)
        totals.add_cosines(f"{name}_cosine", [float(cosine)])
        for prefix, found in (("", cached), ("control_", again)):
            totals.add_cosines(f"{prefix}{name}_gradient_cosine", [column_gradient_cosine(found[:, own], of_view_)])


@compare.register
def _(codec: VisualMapCodec, seen: Seen) -> None:
    name, views = codec.signal, views_of(seen.tiles)
    one: tuple[Any, Any, Any] = (
        as_tensors(codec.decode(seen.record)),
        seen.first.signals[name],
        seen.second.signals[name],
    )
    parts: list[tuple[Any, Any, Any]] = list(zip(*one, strict=True)) if len(views) > 1 else [one] * len(views)
    for view, (cached, live, again) in zip(views, parts, strict=True):
        _compare_map(codec, cached, live, again, of_view(seen.tiles, view), seen.totals)


def _compare_map(
    codec: VisualMapCodec, cached: TeacherMap, first: Tensor, second: Tensor, tiles: tuple[Tile, ...], totals: Totals
) -> None:
    """Add the figures of the map of one view; ``first`` and ``second`` are the teacher's, ``[G, N, N]`` on its tokens."""
    name, content = codec.signal, content_mask(tile_boxes(codec.cells_of(tiles)))
    live, again = (pool_map(codec, maps, tiles) for maps in (first, second))
    exact = TeacherMap.from_maps(live, token_mask=content)
    pairs = image_pairs(live, content) & (live > 0)
    if bool(pairs.any()):
        removed = pairs & ~exact.kept
        totals.add(f"{name}_sink_pairs", float(removed.sum() / pairs.sum()), 1)
        totals.add(f"{name}_sink_mass", float((live * removed).sum() / (live * pairs).sum()), 1)
    for prefix, found in (
        ("", cached),
        ("control_", TeacherMap.from_maps(again, token_mask=content)),
    ):
        for loss, cosine in map_gradient_cosines(found, live, content).items():
            kind = "" if loss == "sink_filtered" else "plain_"
            totals.add_cosines(f"{prefix}{name}_{kind}gradient_cosine", [cosine])


def reconstruct(sparse: SparseLogits, student_log_probs: Tensor) -> Tensor:
    """Dense log-probabilities the tail-bucket loss behaves as if it had: the tail is spread as the student's.

    Args:
        sparse: Decoded rows at temperature 1.
        student_log_probs: The student's, float32 ``[A, V]``, nats.

    Returns:
        float32 ``[A, V]``, nats.

    Source:
        The gradient of docs/method.md, section 2: outside the top-k it is q_j * (1 - eps_T / eps_S).
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

"""A teacher's signals as tensors, live or from a cache: losses cannot tell which. Codecs themselves are numpy.

Dims: A supervised rows, V vocabulary, K most entries of a row, G layer groups, C grid cells, N rows and columns of a map
(visual tokens, or cells of a pooled map).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from vlm_distill_cache.common.attention.boxes import area_pool, pool_keys, pool_queries, tile_boxes
from vlm_distill_cache.common.attention.tiles import Tile
from vlm_distill_cache.common.codecs.kept_columns import sink_threshold
from vlm_distill_cache.common.codecs.logits import LogitCodec, LogitRows
from vlm_distill_cache.common.codecs.row_attention import AttentionRows
from vlm_distill_cache.common.codecs.visual_map import FilteredMaps, VisualMapCodec
from vlm_distill_cache.common.errors import CacheMismatchError, SampleError, TemperatureNotCachedError

# Logits worked on at once: on a GPU 64 MiB per float32 copy; on a CPU what its caches hold, in memory that is used again.
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_OF_A_CPU = 2**24, 2**19
_BLOCK = 32  # neighbours in the vocabulary of which selection sees only the largest at first


@overload
def as_tensors(decoded: np.ndarray) -> Tensor: ...
@overload
def as_tensors(decoded: LogitRows[np.ndarray]) -> "SparseLogits": ...
@overload
def as_tensors(decoded: AttentionRows[np.ndarray]) -> "RowAttention": ...
@overload
def as_tensors(decoded: FilteredMaps[np.ndarray]) -> "TeacherMap": ...
@overload
def as_tensors(decoded: tuple[FilteredMaps[np.ndarray], ...]) -> "tuple[TeacherMap, ...]": ...
def as_tensors(decoded: Any) -> Any:
    """What a codec decoded, as tensors on the CPU that share its memory; of a map of each of several views a tuple."""
    if isinstance(decoded, tuple):
        return tuple(map(as_tensors, decoded))
    if isinstance(decoded, np.ndarray):
        return torch.from_numpy(decoded)
    live = {LogitRows: SparseLogits, AttentionRows: RowAttention, FilteredMaps: TeacherMap}[type(decoded)]
    parts = {entry.name: getattr(decoded, entry.name) for entry in fields(decoded)}
    return live(**{name: torch.from_numpy(p) if isinstance(p, np.ndarray) else p for name, p in parts.items()})


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of nested tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map_tensors(item, function) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{e.name: map_tensors(getattr(value, e.name), function) for e in fields(value)})
    return value


@dataclass(frozen=True)
class SparseLogits(LogitRows[Tensor]):
    """A teacher's distribution on supervised rows."""

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The distribution at one of the cached temperatures.

        Returns:
            Log-probabilities of the entries, float32 `[A, K]` in nats, padding -inf; log-mass of all other
            tokens, float32 `[A]`. Together they sum to 1.

        Raises:
            TemperatureNotCachedError: If the tail mass at `temperature` is not known.
        """
        if temperature not in self.temperatures:
            raise TemperatureNotCachedError(
                f"no tail mass at temperature {temperature}: the teacher's signals hold temperatures "
                f"{list(self.temperatures)}; use one of these, or a cache built from the teacher's weights with {temperature} "
                "among its temperatures"
            )
        tail = self.tail_log_mass[:, self.temperatures.index(temperature)]  # [A]
        if temperature == 1.0:
            return self.log_probs, tail
        scaled = self.log_probs / temperature
        kept = torch.log(-torch.expm1(tail))  # log of 1 - tail mass; exact at both ends
        normaliser = torch.logsumexp(scaled, dim=1) - kept
        return scaled - normaliser[:, None], tail

    def rows(self, chosen: slice) -> Self:
        """Some of the rows."""
        taken: Self = map_tensors(self, lambda tensor: tensor[chosen])
        return taken

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
            return torch.cat(
                [pad(t, (0, width - t.shape[1]), value=fill) if t.shape[1] < width else t for t in tensors]
            )

        return SparseLogits(
            joined("token_ids", 0),
            joined("log_probs", -math.inf),
            joined("entry_mask", False),
            torch.cat([part.tail_log_mass for part in parts]),
            parts[0].temperatures,
        )


@torch.no_grad()
def select_entries(
    codec: LogitCodec, logits: Tensor, labels: Tensor, *, chunk_rows: int | None = None, checked: bool = True
) -> SparseLogits:
    """Keep the likely tokens of dense logits, as a codec says, and measure the mass of the others.

    Works on the logits' device and in float32, a chunk of rows at a time: dense logits are
    never copied whole. Equal logits rank by lowest id, so that the result is a function of its input.

    Args:
        logits: Raw logits of supervised rows, float16, bfloat16 or float32 `[A, V]`; -inf allowed.
        labels: int64 `[A]`, the target token of each row.
        chunk_rows: Rows worked on at once; by default as many as hold 2^24 logits, on a CPU 2^19.
        checked: False: a row that is no distribution is not refused but comes back with a NaN as its first
            log-probability, and labels are checked only if they lie on the CPU. A GPU is then not waited for.

    Returns:
        Rows on the device of `logits`; on a GPU `max_k` wide, because a narrower width would have to be waited for.

    Raises:
        SampleError: If a row has NaN or +inf, or no finite logit; or a label is not in the vocabulary.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"select: expected logits [A, V] and labels [A], got {[*logits.shape]} and {[*labels.shape]}")
    rows, vocabulary = logits.shape
    verify = checked or labels.device.type == "cpu"
    if rows and verify and not bool(((labels >= 0) & (labels < vocabulary)).all()):
        bad = int(torch.nonzero((labels < 0) | (labels >= vocabulary))[0, 0])
        raise SampleError(
            f"row {bad} of {rows}: label {int(labels[bad])} is not in the teacher's vocabulary of "
            f"{vocabulary} tokens; the data must be encoded with the teacher's own tokenizer"
        )
    labels = labels.to(device=logits.device, dtype=torch.int64, non_blocking=True)
    on_cpu = logits.device.type == "cpu"
    step = chunk_rows or max(1, (_CHUNK_ELEMENTS_OF_A_CPU if on_cpu else _CHUNK_ELEMENTS) // vocabulary)
    space = torch.empty(2, min(step, rows), vocabulary, device=logits.device)
    parts = [
        _select_chunk(codec, logits[start : start + step], labels[start : start + step], start, space, checked=checked)
        for start in range(0, rows, step)
    ]
    if parts:
        return SparseLogits.cat(parts)
    empty = torch.zeros(0, 0, device=logits.device)
    tails = torch.zeros(0, len(codec.temperatures), device=logits.device)
    return SparseLogits(empty.long(), empty, empty.bool(), tails, codec.temperatures)


def _select_chunk(
    codec: LogitCodec, logits: Tensor, labels: Tensor, first_row: int, space: Tensor, *, checked: bool
) -> SparseLogits:
    """Select of some rows, in float32 space `[2, >= A, V]` for a masked copy and for exponentials."""
    dense, powers = space[:, : len(logits)]
    dense.copy_(logits)  # [A, V]
    largest = dense.amax(dim=1, keepdim=True)  # [A, 1]
    if checked:
        _check_largest(largest[:, 0], dense, first_row)
    limit = min(codec.max_k, dense.shape[1])
    on_cpu = dense.device.type == "cpu"  # nothing is waited for there
    ids = _top_by_lowest_id(dense, limit)  # [A, limit]
    # Ranks are those of the logits as given; sums of large ones would lose their last digits.
    dense.sub_(largest)
    values = dense.gather(1, ids)
    normaliser = torch.exp(dense, out=powers).sum(dim=1).log_()  # [A], 0 to log V
    rank = torch.arange(limit, device=dense.device)

    # Tokens until p < floor, within min_k and max_k; probability zero is never listed for itself.
    likely = values - normaliser[:, None] >= (math.log(codec.floor) if codec.floor else -math.inf)
    finite = (values > -math.inf).sum(dim=1)
    count = likely.sum(dim=1).clamp(min=codec.min_k).minimum(finite)  # [A]
    listed = ((ids == labels[:, None]) & (rank < count[:, None])).any(dim=1)
    slot = count.clamp(max=limit - 1)[:, None]  # where an unlisted ground truth goes
    label_values = dense.gather(1, labels[:, None])
    ids = ids.scatter(1, slot, torch.where(listed[:, None], ids.gather(1, slot), labels[:, None]))
    values = values.scatter(1, slot, torch.where(listed[:, None], values.gather(1, slot), label_values))
    count = torch.where(listed, count, slot[:, 0] + 1)

    width = int(count.max()) if on_cpu else limit
    mask = rank[:width] < count[:, None]  # [A, width]
    ids, values = ids[:, :width], values[:, :width].masked_fill(~mask, -math.inf)
    dense.scatter_(1, torch.where(mask, ids, ids[:, :1]), -math.inf)  # what is left is the tail
    largest = dense.amax(dim=1, keepdim=True)
    tails = []
    for temperature in codec.temperatures:
        kept = torch.logsumexp(values / temperature, dim=1)
        scaled = dense if temperature == 1.0 else torch.div(dense, temperature, out=powers)
        tail = _log_sum_exp(scaled, largest / temperature, powers)
        tails.append(logsigmoid(tail - kept))  # log(tail / (tail + kept))
    return SparseLogits(
        ids.masked_fill(~mask, 0),
        values - normaliser[:, None],
        mask,
        torch.stack(tails, dim=1),
        codec.temperatures,
    )


def _log_sum_exp(dense: Tensor, largest: Tensor, powers: Tensor) -> Tensor:
    """`torch.logsumexp` to the bit, of rows `[A, V]` whose largest values `[A, 1]` are known, in space that is there."""
    largest = largest.masked_fill(largest.isinf(), 0)
    return torch.sub(dense, largest, out=powers).exp_().sum(dim=1).log_().add_(largest[:, 0])


def _check_largest(largest: Tensor, dense: Tensor, first_row: int) -> None:
    """Refuse rows that are no distribution: the largest logit is NaN if any is, or +inf; of all -inf it is -inf."""
    finite = torch.isfinite(largest)
    if bool(finite.all()):
        return
    row = int(torch.nonzero(~finite)[0, 0])
    nans, infs = int(torch.isnan(dense[row]).sum()), int(torch.isposinf(dense[row]).sum())
    what = f"{nans} NaN and {infs} +inf logits" if nans or infs else "no finite logit"
    raise SampleError(
        f"row {first_row + row}: expected at least one finite logit and neither NaN nor +inf, got {what}; "
        "if the teacher runs in float16, try bfloat16 or float32"
    )


def _top_by_lowest_id(dense: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest values of each row, from the largest on, equal values by lowest id.

    The first of these lie in the first blocks of the vocabulary by the same order, that of their largest values and then
    of their place: before a value of any other block come the largest values of `count` blocks. So only blocks are ranked
    by a whole row, and values only by what those blocks hold: one pass, ties or none.
    """
    rows, vocabulary = dense.shape
    whole = vocabulary // _BLOCK
    if whole <= count:
        return _first(dense, torch.arange(vocabulary, device=dense.device).expand(rows, -1), count)
    places = torch.arange(whole, device=dense.device).expand(rows, -1)
    largest = dense[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK)).amax(dim=2)
    within = torch.arange(_BLOCK, device=dense.device)
    candidates = (_first(largest, places, count)[:, :, None] * _BLOCK + within).flatten(1)  # [A, count * _BLOCK]
    rest = torch.arange(whole * _BLOCK, vocabulary, device=dense.device).expand(rows, -1)
    candidates = torch.cat([candidates, rest], dim=1)
    return _first(dense.gather(1, candidates), candidates, count)


def _first(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """Ids `[A, count]` of the largest of float32 values `[A, N]` with int64 ids `[A, N]`, equal values by lowest id."""
    bits = (values + 0.0).view(torch.int32).long()  # plus zero: -0 and 0 are equal
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the values
    found = ((rising << 32) - ids).topk(count, dim=1).values
    return -found & 0xFFFFFFFF


@dataclass(frozen=True)
class RowAttention(AttentionRows[Tensor]):
    """A teacher's attention of some rows on the image."""

    @classmethod
    def from_cells(cls, cells: Tensor) -> Self:
        """Live attention, float `[A, G, C]`: the image mass is the sum over cells."""
        cells = cells.float()
        return cls(cells, cells.sum(dim=-1))

    @staticmethod
    def cat(parts: "list[RowAttention]") -> "RowAttention":
        """Rows of all parts in order; torch refuses no parts, or unequal groups or cells."""
        return RowAttention(torch.cat([part.cells for part in parts]), torch.cat([part.image_mass for part in parts]))


@dataclass(frozen=True)
class TeacherMap(FilteredMaps[Tensor]):
    """A teacher's visual maps, whole or only what the sink-filtered loss needs; nothing here carries a gradient.

    The released loss compares column means over the pairs in which neither side shows an attention sink. The student's
    half of that mask is known only while it trains; the teacher's half is a fact about the teacher and is kept exactly
    (`kept`), while the values may be coarse. A cache that holds means of kept pairs instead of single values serves this
    loss and no other, and says so.
    """

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

    def whole(self, wanted_by: str) -> Tensor:
        """All values, float32 `[..., N, N]`.

        Raises:
            CacheMismatchError: If the cache does not hold them.
        """
        if not self.complete:
            raise incomplete_map(wanted_by)
        return self.values

    def kept_with(self, student: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """The pairs that neither side's sink filter takes out, bool of the maps' shape; see `mean_columns`."""
        live = student.detach()
        kept: Tensor = self.kept & (live <= sink_threshold(live, image_pairs(live, token_mask)))
        return kept

    def mean_columns(self, student: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
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
        f"{wanted_by} needs the value of each pair of visual tokens, but the cached {VisualMapCodec.signal} holds only "
        "means over pairs without sinks (preset `blocks` or `compact`), for students with the map's own tokens and "
        "losses.visual_map_kind=sink_filtered. Use these, or build the cache with map_preset=exact, or with "
        "map_grid=SIDE, the side of the student's token grid"
    )


def image_pairs(maps: Tensor, token_mask: Tensor | None) -> Tensor:
    """Pairs of two tokens that carry image.

    Args:
        token_mask: bool `[..., N]`, without the group axis. None: all tokens carry image.

    Returns:
        bool, of the maps' shape.
    """
    if token_mask is None:
        return torch.ones_like(maps, dtype=torch.bool)
    mask = token_mask.to(maps.device)[..., None, :]  # [..., 1, N]
    return (mask[..., :, None] & mask[..., None, :]).expand(maps.shape)


def pool_map(codec: VisualMapCodec, maps: Tensor, tiles: tuple[Tile, ...]) -> Tensor:
    """Bring a teacher's map to a codec's cells: keys by sum, queries by mean.

    Args:
        maps: float `[G, N_t, N_t]` on the teacher's tokens.

    Returns:
        float32 `[G, N, N]`; the map itself without a grid.
    """
    if not codec.grid or not tiles:
        return maps.float()
    overlap = area_pool(tile_boxes(tiles), tile_boxes(codec.cells_of(tiles)))
    return pool_queries(pool_keys(maps.float(), overlap), overlap)

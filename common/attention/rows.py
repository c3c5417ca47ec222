"""Attention of chosen rows, from queries and keys, in little memory.

softmax(QK^T) in float32 over all keys a row may see, averaged over heads, and summed over rows where only their sum is
wanted. Scores exist for one chunk of samples, rows and heads at a time, and in the backward pass again: extra memory
grows neither with heads nor with layers, and autograd keeps only queries, keys and the mask, as the model's own
attention does, and what all layers share of the mask. Attention of at most `KEPT_ELEMENTS` is kept instead: where
little is to be computed, computing it twice is what costs.

Dims: B batch (s samples in a chunk), Tq queries, Tk keys, R requested rows (r in a chunk), M requested keys, H query
heads (h in a chunk), Hkv key heads (g in a chunk), D width of a head.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_distill_cache.common.errors import ModelError

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Scores of a chunk, by kind of device; two float32 buffers of that many exist, three in the backward pass with
`softcap`. On a CPU 2 MB stay in its cache (64 MB take up to twice as long); a GPU wants few, large operations."""
KEPT_ELEMENTS = 1 << 19
"""Attention of a layer that is kept for the backward pass, 2 MB; larger ones are computed again."""
_BLOCKED = torch.finfo(torch.float32).min
"""Score of a key that may not be seen; not -inf, so that rows which see nothing stay finite, in backward too."""


def head_mean_attention(
    query: Tensor,
    key: Tensor,
    *,
    rows: Tensor,
    keys: Tensor,
    row_weights: Tensor | None = None,
    attention_mask: Tensor | None = None,
    causal: bool = False,
    scaling: float | None = None,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    last_row: int | None = None,
    shared: "SharedPlace | None" = None,
) -> Tensor:
    """Attention of some rows on some keys, softmaxed over all keys, mean over heads.

    Differentiable once, by query and key; the backward pass computes the attention again.

    Args:
        query: Float ``[B, H, Tq, D]``, rotary embedding applied.
        key: Float ``[B, Hkv, Tk, D]``; H is a multiple of Hkv (grouped-query heads).
        rows: int64 ``[B, R]`` in ``[-1, Tq)``.
        keys: int64 ``[B, M]`` in ``[-1, Tk)``.
        row_weights: Float ``[B, R]``, constants: the result is the sum of the rows, each times its weight; or
            ``[B, V, R]``: V such sums, without a gradient.
        attention_mask: ``[B or 1, 1 or H, Tq, Tk]``; bool (True = may look) or float (added to scores); a constant.
        causal: Query i sees keys 0..i, as SDPA's ``is_causal`` (upper left).
        scaling: Factor on the scores; by default ``D ** -0.5``.
        softcap: Scores are squeezed to below this by tanh before the mask (Gemma 2).
        chunk_rows: Rows at a time; by default as many as :data:`CHUNK_ELEMENTS` allows.
        last_row: Largest of ``rows``, where the caller knows it: no causal row needs a key behind it.
        shared: For all layers of one forward pass with the same ``rows``, ``keys`` and ``row_weights``: what does not
            depend on queries and keys is then worked out once.

    Returns:
        float32 ``[B, R, M]``, with ``row_weights`` ``[B, 1, M]`` or ``[B, V, M]``; 0 for padding and for rows that may look
        nowhere.
    """
    B, H, _, D = query.shape
    Hkv, Tk = key.shape[1], key.shape[2]
    R, M = rows.shape[1], keys.shape[1]
    if R == 0 or M == 0:
        return query.new_zeros((B, _length(R, row_weights), M), dtype=torch.float32)
    if causal and last_row is not None:
        Tk = min(Tk, max(last_row, 0) + 1)
    # Whole samples while they fit, else all rows of some heads of one sample, else some rows.
    limit = CHUNK_ELEMENTS.get(query.device.type, CHUNK_ELEMENTS["cpu"])
    row_scores = H // Hkv * Tk  # of one row and one key head
    most = chunk_rows or max(1, limit // row_scores)
    step = math.ceil(R / math.ceil(R / most))  # chunks about equally long: no small one comes last
    key_heads = min(Hkv, max(1, limit // (row_scores * step)))
    samples = max(1, limit // (row_scores * step * Hkv)) if step == R else 1
    settings = _Settings(
        scale=D**-0.5 if scaling is None else scaling,
        softcap=softcap,
        causal=causal,
        keys_seen=Tk,
        rows=step,
        key_heads=key_heads,
        samples=samples,
    )
    here = query.device
    weights = None if row_weights is None else row_weights.to(here).float()
    inputs = _Inputs(query, key, rows.to(here), keys.to(here), weights, attention_mask)
    place = None if shared is None else shared.find(inputs, settings)
    result: Tensor = _HeadMean.apply(*inputs, settings, place)
    return result


@torch.no_grad()
def last_row_attention(
    query: Tensor,
    parts: Sequence[tuple[Tensor, Tensor]],
    *,
    scaling: float | None = None,
    softcap: float | None = None,
) -> list[Tensor]:
    """Attention of one row on keys that lie in several tensors, softmaxed over all of them, mean over heads.

    As `head_mean_attention`, without gradients and without joining the keys.

    Args:
        query: Float ``[B, H, 1, D]``, rotary embedding applied.
        parts: Keys, float ``[B, Hkv, C, D]``, and their mask ``[B, 1 or H, 1, C]``, bool (True = may look) or float (added).
        scaling, softcap: As of `head_mean_attention`.

    Returns:
        Of each part float32 ``[B, C]``; 0 where the row may not look, but it must see something.
    """
    B, H, _, D = query.shape
    with _without_autocast(query.device.type):
        queries, scores = query.float() * (D**-0.5 if scaling is None else scaling), []
        for keys, mask in parts:
            found = (queries.view(B, keys.shape[1], -1, D) @ keys.float().transpose(2, 3)).view(B, H, -1)  # [B, H, C]
            if softcap is not None:
                found = softcap * (found / softcap).tanh()
            scores.append(found + _as_bias(mask)[:, :, 0])
        mean = torch.cat(scores, dim=2).softmax(dim=2).mean(dim=1)
    return list(mean.split([keys.shape[2] for keys, _ in parts], dim=1))


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """How scores are made and cut into chunks."""

    scale: float
    softcap: float | None
    causal: bool
    keys_seen: int
    rows: int
    key_heads: int
    samples: int

    def is_one_chunk(self, inputs: "_Inputs") -> bool:
        """Whether all samples, rows and heads are worked on at once."""
        samples, key_heads = inputs.key.shape[:2]
        return self.samples >= samples and self.rows >= inputs.rows.shape[1] and self.key_heads >= key_heads


class _Inputs(NamedTuple):
    """What `head_mean_attention` was given, on one device."""

    query: Tensor
    key: Tensor
    rows: Tensor
    keys: Tensor
    row_weights: Tensor | None
    mask: Tensor | None


class _HeadMean(torch.autograd.Function):
    """Head mean of the wanted attention; gradients in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        rows: Tensor,
        keys: Tensor,
        row_weights: Tensor | None,
        mask: Tensor | None,
        settings: _Settings,
        place: "_Place | None",
    ) -> Tensor:
        """Sum over heads, then pick the wanted keys; ``place`` is that of all rows, where it is known."""
        inputs = _Inputs(query, key, rows, keys, row_weights, mask)
        ctx.settings = settings
        length = _length(rows.shape[1], row_weights)
        result = torch.zeros(len(rows), length, keys.shape[1], device=query.device)
        kept: tuple[Tensor, ...] = ()
        keeps = settings.softcap is None and settings.is_one_chunk(inputs)
        # Under autocast the products would be rounded to 16 bits before the softmax.
        with _without_autocast(query.device.type):
            for part in _parts(inputs, settings, place):
                total: Tensor | None = None
                for heads in part.key_heads():
                    probabilities = part.attend(heads).probabilities
                    share = probabilities.sum(dim=1)  # [s, r, Tk]
                    total = share if total is None else total.add_(share)
                    if keeps and probabilities.numel() <= KEPT_ELEMENTS:
                        kept, place = (probabilities,), part.place
                assert total is not None
                picked, target = total.gather(2, part.place.keys), result[part.place.target]
                if row_weights is None:
                    torch.mul(picked, part.place.weight, out=target)
                elif row_weights.ndim == 3:
                    samples, chosen = part.place.where
                    target.baddbmm_(row_weights[samples, :, chosen], picked.mul_(part.place.weight))
                else:
                    target.add_(picked.mul_(part.place.weight).sum(dim=1, keepdim=True))
        # Saved, so that the backward pass frees them, and checkpointing drops them.
        ctx.slices = None if place is None else (place.where, place.target)
        of_place = () if place is None else place.tensors(with_mask=not kept)
        ctx.save_for_backward(*inputs, *of_place, *kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """All heads' probabilities have the same gradient, that of their mean."""
        saved, count = ctx.saved_tensors, len(_Inputs._fields)  # to be read once, as checkpointing demands
        inputs = _Inputs(*saved[:count])
        if inputs.row_weights is not None and inputs.row_weights.ndim == 3:
            raise ModelError("several sums of rows have no gradient; ask for each of them, with its own rows")
        query, key = inputs.query, inputs.key
        place = None if ctx.slices is None else _Place(*ctx.slices, *saved[count : count + 5])
        probabilities = None if place is None or len(saved) == count + 5 else saved[-1]
        settings: _Settings = ctx.settings
        needs_query, needs_key = ctx.needs_input_grad[:2]
        by_query = torch.zeros_like(query) if needs_query else None
        # In float32, because chunks of rows are summed.
        by_key = torch.zeros(key.shape, device=key.device) if needs_key else None
        with _without_autocast(query.device.type):
            for part in _parts(inputs, settings, place):
                place = part.place
                wanted = grad_outputs[0][place.target] * place.weight  # [s, r, M]
                by_mean = torch.zeros(*wanted.shape[:2], settings.keys_seen, device=query.device)
                by_mean.scatter_add_(2, place.keys, wanted)
                for heads in part.key_heads():
                    found = part.attend(heads, keep_slope=True, probabilities=probabilities)
                    by_scores = found.by_scores(by_mean)  # [s * g, H / Hkv * r, Tk]
                    if by_query is not None:
                        part.add_query_gradient(by_query, heads, (by_scores @ found.keys).mul_(settings.scale))
                    if by_key is not None:
                        target = by_key[place.where[0], heads].flatten(0, 1)[:, : settings.keys_seen]
                        target.baddbmm_(by_scores.transpose(1, 2), found.queries)
        by_inputs = by_query, None if by_key is None else by_key.to(key.dtype)
        return *by_inputs, None, None, None, None, None, None


def _length(rows: int, row_weights: Tensor | None) -> int:
    """How many rows the result has of so many that are asked for."""
    if row_weights is None:
        return rows
    return row_weights.shape[1] if row_weights.ndim == 3 else 1


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@dataclass(frozen=True)
class _Attended:
    """Some key heads of a part: scaled queries and keys, float32, ``[s * g, ...]``, and attention ``[s, h, r, Tk]``.

    ``slope`` is that of the squeezing of scores, None without or where not wanted.
    """

    queries: Tensor
    keys: Tensor
    probabilities: Tensor
    slope: Tensor | None

    def by_scores(self, by_mean: Tensor) -> Tensor:
        """Gradient by scores before squeezing, stacked as queries, from that by each head's probabilities."""
        result = self.probabilities * by_mean[:, None]
        result.addcmul_(self.probabilities, result.sum(dim=-1, keepdim=True), value=-1)
        if self.slope is not None:
            result.mul_(self.slope)
        return result.view(*self.queries.shape[:2], -1)


@dataclass(frozen=True)
class _Place:
    """Some rows of some samples, in every layer of a pass: s samples, r rows each.

    Attributes:
        where: Which they are.
        target: Their place in the result, or where their sum is added.
        rows: int64 ``[s, r]``, padding 0.
        keys: Wanted keys, int64 ``[s, r, M]``, padding 0.
        weight: float32 ``[s, r, M]``: one part in H, times the row's weight in a sum; 0 for padding, rows that may look
            nowhere and keys that no row sees.
        bias: What a mask that all heads share adds to scores, float32 ``[s, 1, r, Tk]``.
        mask: A mask of which each head has its own, of these samples ``[s, H, Tq, Tk]``.
    """

    where: tuple[slice, slice]
    target: tuple[slice, slice]
    rows: Tensor
    keys: Tensor
    weight: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, inputs: _Inputs, settings: _Settings, where: tuple[slice, slice]) -> "_Place":
        """The place of some rows."""
        rows, keys = inputs.rows[where], inputs.keys[where[0]]
        real_keys = (keys >= 0) & (keys < settings.keys_seen)  # [s, M]
        sees, rows = rows >= 0, rows.clamp_min(0)
        bias = mask = None
        if inputs.mask is not None:
            mask = inputs.mask.expand(inputs.query.shape[0], -1, -1, -1)[where[0]]
            if mask.shape[1] == 1:
                bias, mask = _bias(mask, rows), None
                sees &= _sees(bias)
            else:
                biases = (_bias(mask[:, head : head + 1], rows) for head in range(mask.shape[1]))
                sees &= torch.stack([_sees(bias) for bias in biases]).any(dim=0)
        elif settings.causal:
            columns = torch.arange(settings.keys_seen, device=rows.device)
            bias = torch.where(columns <= rows[:, :, None], 0.0, _BLOCKED)[:, None]
        weight, target = sees / inputs.query.shape[1], where
        if inputs.row_weights is not None:
            weight = weight * inputs.row_weights[where] if inputs.row_weights.ndim == 2 else weight
            target = where[0], slice(None)
        return cls(
            where,
            target,
            rows,
            (keys * real_keys)[:, None].expand(-1, rows.shape[1], -1),
            weight[:, :, None] * real_keys[:, None],
            bias,
            mask,
        )

    def tensors(self, *, with_mask: bool) -> tuple[Tensor | None, ...]:
        """Rows, keys, weight, bias and mask; the last two are of no use where the attention is known."""
        return (self.rows, self.keys, self.weight, *((self.bias, self.mask) if with_mask else (None, None)))

    def bias_of(self, heads: slice) -> Tensor | None:
        """What the mask adds to the scores of some query heads: float32 ``[s, 1 or heads, r, Tk]``."""
        return self.bias if self.mask is None else _bias(self.mask[:, heads], self.rows)


class SharedPlace:
    """The place of all wanted rows and keys, for the layers of one forward pass.

    Kept only where everything is one chunk, so that it is small beside :data:`CHUNK_ELEMENTS`, and for two masks: layers
    that see everything and layers with sliding windows take turns.
    """

    def __init__(self) -> None:
        self._known: tuple[tuple[tuple[Any, ...], _Place], ...] = ()

    def find(self, inputs: _Inputs, settings: _Settings) -> _Place | None:
        """The place of all rows, new or that of a layer before; None where there are several chunks."""
        if not settings.is_one_chunk(inputs):
            return None
        seen = (settings, inputs.query.shape, inputs.query.device)
        known = self._known  # read once: layers on several GPUs are run backward by several threads
        for (mask, *others), place in known:
            if mask is inputs.mask and tuple(others) == seen:
                return place
        place = _Place.of(inputs, settings, (slice(None), slice(None)))
        self._known = (*known[-1:], ((inputs.mask, *seen), place))
        return place


class _Part:
    """The queries and keys of a layer at a place."""

    def __init__(self, place: _Place, inputs: _Inputs, settings: _Settings) -> None:
        samples = place.where[0]
        self.place, self._settings = place, settings
        self._query, self._key = inputs.query[samples], inputs.key[samples, :, : settings.keys_seen]

    def key_heads(self) -> Iterator[slice]:
        """Some key heads at a time."""
        for start in range(0, self._key.shape[1], self._settings.key_heads):
            yield slice(start, min(start + self._settings.key_heads, self._key.shape[1]))

    def attend(self, heads: slice, *, keep_slope: bool = False, probabilities: Tensor | None = None) -> _Attended:
        """Attention of these rows by some key heads; ``probabilities`` are not computed where they are known."""
        key = self._key[:, heads]
        query = self._query[:, self._query_heads(heads)]
        # Query heads that share a key head are stacked as rows: keys are never repeated. Samples and heads of
        # several samples become one dimension, which copies keys; those of one do not.
        queries = _of_rows(query, self.place.rows).float() * self._settings.scale
        queries = queries.reshape(key.shape[0] * key.shape[1], -1, key.shape[3])
        keys = key.float().flatten(0, 1)
        if probabilities is not None:
            return _Attended(queries, keys, probabilities, None)
        scores = (queries @ keys.transpose(1, 2)).view(*query.shape[:2], -1, keys.shape[1])  # [s, h, r, Tk]
        slope = None
        if self._settings.softcap is not None:
            scores.div_(self._settings.softcap).tanh_()
            slope = 1 - scores.square() if keep_slope else None
            scores.mul_(self._settings.softcap)
        bias = self.place.bias_of(self._query_heads(heads))
        if bias is not None:
            scores.add_(bias)
        return _Attended(queries, keys, scores.softmax(dim=-1), slope)

    def add_query_gradient(self, total: Tensor, heads: slice, gradient: Tensor) -> None:
        """Add the gradient of stacked queries to that of all, ``[B, H, Tq, D]``; rows may be repeated."""
        target = total[self.place.where[0], self._query_heads(heads)]
        index = self.place.rows[:, None, :, None].expand(-1, target.shape[1], -1, target.shape[3])
        target.scatter_add_(2, index, gradient.view(index.shape).to(target.dtype))

    def _query_heads(self, heads: slice) -> slice:
        shared = self._query.shape[1] // self._key.shape[1]
        return slice(heads.start * shared, heads.stop * shared)


def _of_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Those of some rows ``[s, r]``: ``[s, heads, Tq, any]`` to ``[s, heads, r, any]``."""
    samples = torch.arange(len(rows), device=rows.device)[:, None]
    return values[samples, :, rows].transpose(1, 2)


def _bias(mask: Tensor, rows: Tensor) -> Tensor:
    """What a mask ``[s, heads, Tq, Tk]`` adds to the scores of some rows ``[s, r]``: float32 ``[s, heads, r, Tk]``."""
    return _as_bias(_of_rows(mask, rows))


def _as_bias(mask: Tensor) -> Tensor:
    """What a mask of any kind adds to scores, float32."""
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, _BLOCKED)
    # Blocked is what a mask builder wrote as "minimum of the dtype" or -inf; smaller biases are kept.
    return mask.float().masked_fill_(mask <= torch.finfo(mask.dtype).min / 2, _BLOCKED)


def _sees(bias: Tensor) -> Tensor:
    """Which rows of one head may look anywhere: ``[s, 1, r, Tk]`` to bool ``[s, r]``."""
    return bias[:, 0].amax(dim=-1) > _BLOCKED / 2


def _parts(inputs: _Inputs, settings: _Settings, place: _Place | None) -> Iterator[_Part]:
    """All rows at once, where their place is known; else some samples at a time and, of many rows, some."""
    if place is not None:
        yield _Part(place, inputs, settings)
        return
    for first in range(0, inputs.rows.shape[0], settings.samples):
        for start in range(0, inputs.rows.shape[1], settings.rows):
            where = slice(first, first + settings.samples), slice(start, start + settings.rows)
            yield _Part(_Place.of(inputs, settings, where), inputs, settings)

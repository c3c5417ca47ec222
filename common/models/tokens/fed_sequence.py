"""A decoder's pass over a part of its tokens: what is left keeps its positions and sees what it saw.

Samples of a batch run to the same length: where fewer of one are left, tokens that were left out fill up, seen by none.
Keys and values of the pass are a shorter cache than the text; outside of the decoder it tells the text's length, so that
`generate` and the models around decoders count as always.

Dims: B batch, T tokens of this pass, P tokens of the passes before, L tokens that run, S cached tokens, H heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.around import Run

_FULL, _SLIDING = "full_attention", "sliding_attention"
_CACHES = ("cache", "past_key_values")  # the library's name has changed with version 5.24


@dataclass
class Fed:
    """What a shorter cache holds.

    Attributes:
        places: Of its tokens in the text, int64 ``[B, S]``.
        live: Which of them may be seen, bool ``[B, S]``.
        dropped: How many tokens less it has than the text.
        least: How many of its tokens there are up to the last that was left out: they cannot be taken back one by one.
    """

    places: Tensor
    live: Tensor
    dropped: int
    least: int


@cache
def _shorter(cache_class: Any) -> Any:
    """A class of caches that tells the text's length, but while the decoder runs."""

    class Shorter(cache_class):
        fed: Fed
        running: bool = False

        def get_seq_length(self, layer_idx: int = 0) -> int:
            length = int(super().get_seq_length(layer_idx))
            return length if self.running or not length else length + self.fed.dropped

        def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
            if self.running or not super().get_seq_length(layer_idx):
                found: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
                return found
            return self.get_seq_length(layer_idx) + int(query_length), 0

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._pick(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._pick(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            fed = self.fed
            places, live = (part.repeat_interleave(repeats, dim=0) for part in (fed.places, fed.live))
            self.fed = replace(fed, places=places, live=live)

        def crop(self, tokens: int) -> None:
            length = self.get_seq_length()
            undo = -tokens if tokens <= 0 else max(length - tokens, 0)  # older libraries give the length to come
            if undo > length - self.fed.dropped - self.fed.least:
                raise ModelError(
                    f"{undo} tokens were to be taken back, more than follow the pictures: of those, this student does not feed "
                    "all; read the prompt again"
                )
            super().crop(tokens if tokens <= 0 or self.running else tokens - self.fed.dropped)

        def _pick(self, rows: Tensor) -> None:
            rows, fed = rows.to(self.fed.places.device), self.fed
            self.fed = replace(fed, places=fed.places[rows], live=fed.live[rows])

    Shorter.__name__ = Shorter.__qualname__ = cache_class.__name__
    return Shorter


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The keys and values of earlier passes among a decoder's arguments; None without."""
    return next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)


@dataclass(frozen=True)
class Feeding:
    """Which tokens of a pass run.

    Attributes:
        stands_for: Which token runs in the place of each, int64 ``[B, T]``; -1: none. None: all run.
        index: Tokens that run, int64 ``[B, L]``, in their order.
        live: Which of them count, bool ``[B, L]``; others fill up.
        keys: Places in the text of all that is cached or runs, int64 ``[B, S + L]``.
        live_keys: Which of these may be seen, bool ``[B, S + L]``.
        before: P.
    """

    stands_for: Tensor | None
    index: Tensor
    live: Tensor
    keys: Tensor
    live_keys: Tensor
    before: int

    @classmethod
    def of(cls, decoder: Any, arguments: Mapping[str, Any], stands_for: Tensor | None) -> "Feeding | None":
        """What of a pass runs; None where all does, and all did before.

        Args:
            stands_for: As the attribute.

        Raises:
            ModelError: If the cache or the attention is of a kind that cannot be shorter than the text.
        """
        past = cache_of(arguments)
        fed = _fed(past)
        if stands_for is None and fed is None:
            return None
        embeds = arguments.get("inputs_embeds")
        given = arguments["input_ids"] if embeds is None else embeds
        batch, length = given.shape[:2]
        before = 0 if past is None else int(past.get_seq_length())
        _refuse(arguments, past)
        everything = torch.arange(length, device=given.device).expand(batch, -1)
        if stands_for is None:
            index, live = everything, torch.ones_like(everything, dtype=torch.bool)
        else:
            wanted = stands_for == everything
            padding = _padding(arguments.get("attention_mask"), before, length)
            index, live = _gathered(wanted if padding is None else wanted & ~padding)
        if fed is not None:
            old, old_live = fed.places.to(index.device), fed.live.to(index.device)
        else:
            old = torch.arange(before, device=index.device).expand(batch, -1)
            old_live = torch.ones_like(old, dtype=torch.bool)
        keys, live_keys = torch.cat([old, index + before], dim=1), torch.cat([old_live, live], dim=1)
        return cls(stands_for, index, live, keys, live_keys, before)

    def places(self, length: int) -> Tensor:
        """Where each of T tokens stands among those that run: int64 ``[B, T]``, -1 where it does not."""
        order = torch.arange(self.index.shape[1], device=self.index.device).expand_as(self.index)
        empty = torch.full((len(self.index), length), -1, device=self.index.device)
        return empty.scatter(1, self.index, torch.where(self.live, order, -1))

    def pick(self, values: Tensor) -> Tensor:
        """Those of the tokens that run: ``[B, T, ...]`` to ``[B, L, ...]``."""
        rows = torch.arange(len(self.index), device=values.device)[:, None]
        return values.expand(len(self.index), *values.shape[1:])[rows, self.index.to(values.device)]

    def spread(self, values: Tensor, length: int) -> Tensor:
        """Values of the tokens that run at their places, 0 elsewhere: ``[B, L, ...]`` to ``[B, T, ...]``."""
        index, live = self.index.to(values.device), self.live.to(values.device)
        rows = torch.arange(len(index), device=values.device)[:, None].expand_as(index)
        empty = values.new_zeros(len(index), length, *values.shape[2:])
        return empty.index_put((rows[live], index[live]), values[live])


def _fed(past: Any) -> Fed | None:
    """What a cache holds, if it is shorter than the text; tokens that were taken back (`crop`) are gone here, too."""
    fed = getattr(past, "fed", None)
    if fed is None:
        return None
    held = int(past.get_seq_length()) - fed.dropped
    if held <= 0:
        return None
    return Fed(fed.places[:, :held], fed.live[:, :held], fed.dropped, fed.least)


def _refuse(arguments: Mapping[str, Any], past: Any) -> None:
    if bool(getattr(past, "is_compileable", False)):
        raise ModelError(
            f"{type(past).__name__} has a fixed length, which a student with fewer visual tokens does not fill as the library "
            "expects; leave cache_implementation out of generate"
        )
    if any(name.startswith("cu_seq_lens") and value is not None for name, value in arguments.items()):
        raise ModelError(
            "samples without padding one behind the other (cu_seq_lens) cannot be run with fewer visual tokens; pad them"
        )


def _padding(mask: Any, before: int, length: int) -> Tensor | None:
    """Which of T tokens are padding, bool ``[B, T]``; None where the mask does not say.

    In a mask that is ready no token sees padding. It may see itself alone, so that no row is empty.
    """
    if isinstance(mask, Mapping):
        mask = mask.get(_FULL)
    if not isinstance(mask, Tensor) or mask.shape[-1] != before + length:
        return None
    if mask.ndim == 2:
        return mask[:, before:] == 0
    seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any(dim=1)  # [B, T, P + T]
    if seen.shape[1] != length:
        return None
    own = torch.arange(length, device=seen.device)
    unseen, others = ~seen.any(dim=1)[:, before:], seen.clone()
    others[:, own, own + before] = False
    alone = ~(others.any(dim=2) | others.any(dim=1)[:, before:])
    found = unseen | alone
    return found & ~found.all(dim=1, keepdim=True)


def _gathered(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Wanted tokens of each sample in order, filled up with others to one length: their index, and which are wanted."""
    counts = wanted.sum(dim=1, keepdim=True)
    longest = max(1, int(counts.max()))
    others = ~wanted
    filling = others & (others.cumsum(dim=1) <= longest - counts)
    index = (wanted | filling).nonzero()[:, 1].view(len(wanted), longest)
    return index, wanted.gather(1, index)


def feed(feeding: Feeding, run: Run, decoder: Any, arguments: dict[str, Any]) -> Any:
    """Run a decoder on some tokens, and give what it returns for all.

    Args:
        decoder: Knows ``visual_mask``; is told ``places`` and ``stands_for``.
        arguments: The decoder's, of all T tokens.
    """
    embeds, ids = arguments.get("inputs_embeds"), arguments.pop("input_ids", None)
    if embeds is None:
        embeds = decoder.get_input_embeddings()(ids)
    length, past, visual = embeds.shape[1], cache_of(arguments), decoder.visual_mask
    if feeding.stands_for is not None:
        decoder.places, decoder.stands_for = feeding.places(length), feeding.stands_for
        arguments |= _deepstack(feeding, arguments, visual)
        embeds = pool(embeds, feeding.stands_for)
        if visual is not None:
            decoder.visual_mask = feeding.pick(visual) & feeding.live
    arguments["inputs_embeds"] = feeding.pick(embeds)
    arguments["position_ids"] = _positions(feeding, arguments.get("position_ids"), length)
    if hasattr(past, "fed"):
        past.running = True
    try:
        arguments["attention_mask"] = _Masks(feeding, decoder, past, embeds).cut(arguments.get("attention_mask"))
        found = run(**arguments)
    finally:
        if hasattr(past, "fed"):
            past.running = False
    return _restored(feeding, found, past, length)


def _positions(feeding: Feeding, positions: Tensor | None, length: int) -> Tensor:
    """Positions of the tokens that run: ``[B, L]``, or ``[axes, B, L]`` of those that have several."""
    if positions is None:
        positions = torch.arange(feeding.before, feeding.before + length, device=feeding.index.device)[None]
    index = feeding.index.to(positions.device)
    whole = positions.expand(*positions.shape[:-2], len(index), positions.shape[-1])
    return whole.gather(-1, index.expand(*whole.shape[:-2], -1, -1))


def pool(values: Tensor, stands_for: Tensor) -> Tensor:
    """The mean of the tokens for which one stands, at its place: ``[B, T, D]``; others, and those alone, stay as they are."""
    batch, length = stands_for.shape
    here = torch.arange(length, device=stands_for.device)
    moved = (stands_for >= 0) & (stands_for != here)
    if not bool(moved.any()):
        return values
    counted = stands_for.clamp_min(0)
    is_counted = (stands_for >= 0).to(torch.float32)
    counts = torch.zeros(batch, length, device=values.device).scatter_add(1, counted, is_counted)
    index = counted[..., None].expand_as(values)
    sums = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
    sums = sums.scatter_add(1, index, values.float() * is_counted[..., None])
    means = (sums / counts.clamp_min(1.0)[..., None]).to(values.dtype)
    return torch.where((counts > 1)[..., None], means, values)


def _deepstack(feeding: Feeding, arguments: Mapping[str, Any], visual: Tensor | None) -> dict[str, Any]:
    """Features that Qwen3-VL adds to visual tokens in its first layers."""
    features, mask = arguments.get("deepstack_visual_embeds"), arguments.get("visual_pos_masks")
    if features is None or mask is None:
        return {}
    assert feeding.stands_for is not None
    kept = feeding.pick(mask) & feeding.live
    found = []
    for feature in features:
        whole = feature.new_zeros(*mask.shape, feature.shape[-1]).index_put((mask,), feature)
        found.append(feeding.pick(pool(whole, feeding.stands_for))[kept])
    return {"visual_pos_masks": kept, "deepstack_visual_embeds": found}


class _Masks:
    """What tokens that run may see, of what all would."""

    def __init__(self, feeding: Feeding, decoder: Any, past: Any, embeds: Tensor) -> None:
        self.feeding, self.past, self.embeds = feeding, past, embeds
        config = decoder.config
        self.kinds = tuple(getattr(config, "layer_types", None) or ())
        self.window = int(getattr(config, "sliding_window", None) or 0)
        self.slides = self.window > 0 and (not self.kinds or _SLIDING in self.kinds)
        self.implementation = str(config._attn_implementation)
        self.queries = feeding.index + feeding.before  # places, [B, L]

    def cut(self, mask: Any) -> Any:
        """A mask of all T tokens, as the decoder takes it, for those that run."""
        if isinstance(mask, Mapping):
            return {kind: self._ready(part, kind) for kind, part in mask.items()}
        if isinstance(mask, Tensor) and mask.ndim == 4:
            return self._ready(mask, _SLIDING if self.slides and not self.kinds else _FULL)
        if mask is not None and mask.ndim != 2:
            raise ModelError(
                f"an attention mask of shape {list(mask.shape)} cannot be cut to fewer visual tokens; give [B, T] or [B, 1, T, T]"
            )
        flat = self._flat(mask)
        if not self.slides:
            return flat
        if "flash" in self.implementation:
            raise ModelError(
                "flash attention counts sliding windows in tokens that run, not in those of the text; load this student with "
                "attn_implementation='sdpa'"
            )
        seen = self._causal() & flat.bool()[:, None, None]
        near = seen & (self.queries[:, None, :, None] - self.feeding.keys[:, None, None] < self.window)
        if not self.kinds:
            return self._form(self._last(near, _SLIDING))
        return {_FULL: self._form(self._last(seen, _FULL)), _SLIDING: self._form(self._last(near, _SLIDING))}

    def _flat(self, mask: Tensor | None) -> Tensor:
        """Of padding, ``[B, S + L]``; there is always one, for without it gaps in positions would be ends of samples."""
        live = self.feeding.live_keys
        if mask is None:
            return live.long()
        self._check(mask.shape[-1])
        return mask.gather(1, self.feeding.keys.to(mask.device)) * live.to(mask.device, mask.dtype)

    def _check(self, found: int) -> None:
        expected = self.feeding.before + self.embeds.shape[1]
        if found < expected:
            raise ModelError(
                f"the attention mask is for {found} tokens, the text has {expected}; give one for all tokens, cached ones too"
            )

    def _ready(self, mask: Tensor | None, kind: str) -> Tensor | None:
        """One that is ready, ``[B, H, T, P + T]``, or none: for all behind each token."""
        if mask is not None and mask.ndim == 2:
            return self._flat(mask)
        if mask is None:
            if bool(self.feeding.live_keys.all()):
                return None
            return self._form(self._last(self._causal() & self.feeding.live_keys[:, None, None], kind))
        self._check(mask.shape[-1])
        batch, heads, rows, columns = len(self.queries), *mask.shape[1:]
        mask = mask.expand(batch, -1, -1, -1)
        index = self.feeding.index.to(mask.device)[:, None, :, None].expand(-1, heads, -1, columns)
        mask = mask.gather(2, index if rows > 1 else index.clamp_max(0))
        keys = self.feeding.keys.to(mask.device)[:, None, None].expand(-1, heads, mask.shape[2], -1)
        mask, dead = mask.gather(3, keys), ~self.feeding.live_keys.to(mask.device)[:, None, None]
        no = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return self._last(mask.masked_fill(dead, no), kind)

    def _causal(self) -> Tensor:
        """Each token and what stands before it: bool ``[B, 1, L, S + L]``."""
        return self.feeding.keys[:, None, None] <= self.queries[:, None, :, None]

    def _last(self, mask: Tensor, kind: str) -> Tensor:
        """The columns of what layers of a kind have cached, and of what runs."""
        held = mask.shape[-1]
        if self.past is not None and self.past.get_seq_length():
            layer = self.kinds.index(kind) if kind in self.kinds else 0
            held = int(self.past.get_mask_sizes(mask.shape[2], layer)[0])
        return mask[..., -held:]

    def _form(self, mask: Tensor) -> Tensor:
        """As the implementation takes it: eager attention adds its mask."""
        if self.implementation != "eager":
            return mask
        zeros = torch.zeros(mask.shape, dtype=self.embeds.dtype, device=mask.device)
        return zeros.masked_fill(~mask, torch.finfo(self.embeds.dtype).min)


def _restored(feeding: Feeding, found: Any, past: Any, length: int) -> Any:
    """What a decoder returned for the tokens that ran, for all; the cache learns what it holds."""
    as_tuple = isinstance(found, tuple)
    names = [name for name in _CACHES if not as_tuple and found.get(name) is not None]
    new = past if past is not None else found[names[0]] if names else None
    if as_tuple and new is None:
        new = next((part for part in found if hasattr(part, "get_seq_length")), None)
    if new is not None:
        dropped = feeding.before + length - feeding.keys.shape[1]
        if not hasattr(new, "fed"):
            cache_class: Any = type(new)
            new.__class__ = _shorter(cache_class)
        least = new.fed.least if feeding.stands_for is None else _up_to_gaps(feeding, feeding.before + length)
        new.fed = Fed(feeding.keys, feeding.live_keys, dropped, least)
    if feeding.stands_for is None:
        return found
    if as_tuple:
        return (feeding.spread(found[0], length), *found[1:])
    found["last_hidden_state"] = feeding.spread(found["last_hidden_state"], length)
    if found.get("hidden_states") is not None:
        found["hidden_states"] = tuple(feeding.spread(states, length) for states in found["hidden_states"])
    if found.get("attentions") is not None:
        found["attentions"] = tuple(_spread_map(feeding, part, length) for part in found["attentions"])
    return found


def _up_to_gaps(feeding: Feeding, length: int) -> int:
    """How many tokens the cache holds in front of the end of the text that all samples have without a gap."""
    held = feeding.keys.shape[1]
    expected = torch.arange(length - held, length, device=feeding.keys.device)
    whole = ((feeding.keys == expected) & feeding.live_keys).all(dim=0)
    return held - int(whole.flip(0).cumprod(dim=0).sum())


def _spread_map(feeding: Feeding, attention: Tensor, length: int) -> Tensor:
    """Attention of what ran for all rows and columns: ``[B, H, L, S + L]`` to ``[B, H, T, P + T]``, 0 elsewhere."""
    batch, heads = attention.shape[:2]
    keys = feeding.keys.to(attention.device)[:, None, None].expand(-1, heads, attention.shape[2], -1)
    wide = attention.new_zeros(batch, heads, attention.shape[2], feeding.before + length)
    wide = wide.scatter(3, keys, attention * feeding.live_keys.to(attention.device)[:, None, None])
    return feeding.spread(wide.transpose(1, 2), length).transpose(1, 2)

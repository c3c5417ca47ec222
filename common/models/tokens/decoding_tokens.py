"""Attend only some visual tokens while an answer is decoded, and swap others in where it begins to look elsewhere.

The prompt is read with all visual tokens. Then the keys and values of those that its last row looked at most stay in the
cache, in *slots* in front of the words, and each step is as short as if there were no others. ``fixed`` forgets the
others. ``shift`` stashes all, computes at each token how its queries look at **all** visual tokens of the chosen layers, and
where the kept ones hold too little of that, it fills the slots anew and runs the step again: the token is decided with
what it looks at. A budget of all tokens changes nothing, to the bit; nor do passes over whole texts change, in which nothing
is decoded (losses, likelihoods, ``generate`` without a cache).

Outside, the cache keeps reporting how long the text is, so masks and positions are those of the whole text; `_step` takes
what is there of a mask. Batches, padding, beams and samples without pictures are as ever.

The rule is ours; the idea is that of the paper, whose formula could not be read.

Dims: B batch, T prompt, N visual tokens of a prompt, K slots, P = K + words of a prompt, H key heads, D width of a head.

Source:
    arXiv:2604.12358 (relevant visual information shift); keeping what the last prompt row looks at: FastV (arXiv:2403.06764).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from vlm_distill_cache.common.attention.capture import attention_module, is_recorded, watch
from vlm_distill_cache.common.attention.layers import middle_span
from vlm_distill_cache.common.attention.rows import head_mean_attention, last_row_attention
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.around import Around, Run, surround
from vlm_distill_cache.common.models.tokens.budget import check_budget, kept_count

NAME = "decoding_tokens"
_PASTS = ("cache", "past_key_values")  # the library's names for keys and values of earlier steps
Masks = Tensor | dict[str, Tensor | None] | None


@dataclass(frozen=True)
class DecodingTokens:
    """How many visual tokens a step of decoding attends, and whether they change.

    Attributes:
        keep: A share of a prompt's visual tokens, or a number of 2 or more.
        by: ``fixed`` or ``shift``.
        shift_threshold: In (0, 1]: a shift is where the kept tokens hold less than this share of what the best do.
        layers: Whose attention chooses, mean over them and their heads.
    """

    keep: float
    by: Literal["fixed", "shift"]
    shift_threshold: float
    layers: tuple[int, ...]

    @classmethod
    def of(cls, stored: Any, depth: int) -> "DecodingTokens":
        """Read what ``config.json`` holds; a ModelError says what of it cannot be used."""
        known = {"keep", "by", "shift_threshold", "layers"}
        if not isinstance(stored, Mapping) or not {"keep", "by"} <= stored.keys() <= known:
            raise ModelError(
                f"{NAME}: got {str(stored)[:120]!r}; expected an object of keep, by, shift_threshold, layers"
            )
        by, threshold = stored["by"], stored.get("shift_threshold", 0.75)
        if by not in ("fixed", "shift"):
            raise ModelError(f"{NAME}: by is {str(by)[:40]!r}; expected fixed or shift")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
            raise ModelError(
                f"{NAME}: shift_threshold is {str(threshold)[:40]!r}; expected a number above 0, at most 1"
            )
        layers = stored.get("layers")
        layers = list(middle_span(depth)) if layers is None else layers
        fits = isinstance(layers, list | tuple) and layers and len(set(map(str, layers))) == len(layers)
        if not fits or not all(type(layer) is int and 0 <= layer < depth for layer in layers):
            raise ModelError(
                f"{NAME}: layers are {str(layers)[:80]}; expected distinct layers of a language model with {depth} "
                f"(0 to {depth - 1}), or null for the middle ones"
            )
        return cls(check_budget(NAME, stored["keep"]), by, float(threshold), tuple(layers))


@dataclass
class DecodingCounts:
    """What was done since the last prompt.

    Attributes:
        events: By step of decoding, whether each sample's kept tokens were changed, bool ``[B]``; the first step decides
            an answer's second token.
        swapped: By step, how many tokens came in, int64 ``[B]``.
    """

    events: list[Tensor] = field(default_factory=list)
    swapped: list[Tensor] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps of decoding, those of the prompt left out."""
        return len(self.events)


def decoding_counts(model: Any) -> DecodingCounts | None:
    """What the last ``generate`` of a model did; of several prompts, the last one's. None: it decodes as any other."""
    found = (module.decoded for module in model.modules() if isinstance(module, Around) and module.decoded is not None)
    counts: DecodingCounts | None = next(found, None)
    return counts


def best_places(gaze: Tensor, sizes: Tensor) -> Tensor:
    """The places that are looked at most, the best first; of equals the first.

    Args:
        gaze: float ``[B, N]``, 0 or more, below 0 where there is no place.
        sizes: How many of each sample, int64 ``[B]``, as many places as it has at most.

    Returns:
        int64 ``[B, K]``, K the largest of ``sizes``; -1 behind a sample's own.
    """
    most = int(sizes.max())
    order = gaze.argsort(dim=1, descending=True, stable=True)[:, :most]
    return order.masked_fill(torch.arange(most, device=gaze.device) >= sizes[:, None], -1)


def kept_mass(gaze: Tensor, kept: Tensor) -> Tensor:
    """How much of each sample's gaze ``[B, N]`` falls on its kept places, int64 ``[B, K]`` (-1: none): ``[B]``."""
    mask = torch.zeros(gaze.shape[0], gaze.shape[1] + 1, dtype=gaze.dtype, device=gaze.device)
    mask.scatter_(1, torch.where(kept < 0, gaze.shape[1], kept), 1.0)
    return (gaze * mask[:, :-1]).sum(dim=1)  # in the order of places: equal sets have equal mass


def find_shift(gaze: Tensor, kept: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Which samples look elsewhere than at what is kept, and where each looks most.

    Args:
        gaze: Of one token, float ``[B, N]`` as of `best_places`.
        kept: int64 ``[B, K]`` as of `best_places`.
        threshold: A shift is where ``gaze on kept < threshold * gaze on the best``, as many places.

    Returns:
        bool ``[B]``, and the best places, as ``kept``.
    """
    best = best_places(gaze, (kept >= 0).sum(dim=1))
    return kept_mass(gaze, kept) < threshold * kept_mass(gaze, best), best


@dataclass
class _Slots:
    """What all layers of a cache share, until the next prompt.

    Attributes:
        places: Where the prompt's visual tokens are in it, int64 ``[B, N]``; -1 behind a sample's own.
        kept: Which of them fill slots, int64 ``[B, K]``, indices of ``places``; -1: none.
        words: Where the prompt's other tokens are, int64 ``[B, P - K]``; -1 behind a sample's own.
        prompt: T.
    """

    places: Tensor
    kept: Tensor
    words: Tensor
    prompt: int

    @property
    def columns(self) -> Tensor:
        """Where in the prompt each column of the cache is from, int64 ``[B, P]``; -1: nowhere."""
        slots = self.places.gather(1, self.kept.clamp_min(0)).masked_fill(self.kept < 0, -1)
        return torch.cat([slots, self.words], dim=1)

    @property
    def away(self) -> int:
        """By how many tokens the cache is shorter than the text."""
        return self.prompt - self.kept.shape[1] - self.words.shape[1]

    def choose(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Take other samples."""
        self.places, self.kept, self.words = choose(self.places), choose(self.kept), choose(self.words)


class _Layer(DynamicLayer):
    """Keys and values of one layer: of the slots, of the prompt's words, and of what was decoded.

    Attributes:
        visual: Keys and values of all visual tokens, ``[B, H, N, D]``; None where slots stay as they are.
    """

    def __init__(self, layer: Any, slots: _Slots, *, leads: bool, stash: bool) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.slots, self._leads = slots, leads
        self.visual = (_take(layer.keys, slots.places), _take(layer.values, slots.places)) if stash else None
        self.keys, self.values = _take(layer.keys, slots.columns), _take(layer.values, slots.columns)

    def fill_slots(self, undo: int) -> None:
        """Take what is kept now from the stash, and forget the last ``undo`` tokens."""
        assert self.visual is not None
        count = self.slots.kept.shape[1]
        stashed = (_take(one, self.slots.kept) for one in self.visual)
        self.keys, self.values = (
            torch.cat([new, old[:, :, count : old.shape[2] - undo]], dim=2)
            for new, old in zip(stashed, (self.keys, self.values), strict=True)
        )

    def get_seq_length(self, *_: Any) -> int:
        """How long the text is, with visual tokens that are in no slot."""
        held: int = super().get_seq_length()
        return held and held + self.slots.away

    def crop(self, tokens: int) -> None:
        """Forget the last ``-tokens``; older libraries give the length to come. Prompts stay whole."""
        undo = -tokens if tokens <= 0 else max(self.get_seq_length() - tokens, 0)
        if undo > self.get_seq_length() - self.slots.prompt:
            raise ModelError(
                f"{NAME}: {undo} tokens were to be taken back, more than were decoded: read the prompt again for another answer"
            )
        self.keys, self.values = (one[:, :, : one.shape[2] - undo] for one in (self.keys, self.values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams go on from others."""
        self._choose(lambda one: one.index_select(0, beam_idx.to(one.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sample several times."""
        self._choose(lambda one: one.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some samples only."""
        self._choose(lambda one: one[indices.to(one.device)])

    def _choose(self, choose: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = choose(self.keys), choose(self.values)
        if self.visual is not None:
            self.visual = (choose(self.visual[0]), choose(self.visual[1]))
        if self._leads:
            self.slots.choose(choose)


def decode_with_fewer(model: Any, parts: Mapping[str, str], stored: Any) -> None:
    """Let a model decode with some visual tokens only, or, by None, with all again.

    Args:
        model: With weights or without.
        parts: As `surround` takes them.
        stored: ``{"keep", "by", "shift_threshold", "layers"}``, see `DecodingTokens`.

    Raises:
        ModelError: If the settings cannot be used, or the decoder's layers do not keep all keys (sliding windows).
    """
    decoder = model.get_submodule(parts["language_model"]) if "language_model" in parts else None
    if decoder is None or not hasattr(decoder, "layers"):
        raise ModelError(
            f"{NAME}: {type(model).__name__} has no known decoder with `layers`; leave {NAME} out for this model"
        )
    if isinstance(decoder, Around):
        decoder.wrappers = tuple(one for one in decoder.wrappers if getattr(one, "func", None) is not _decode)
        decoder.decoded = None
    if stored is None:
        return
    settings = DecodingTokens.of(stored, len(decoder.layers))
    _refuse_layers(DynamicCache(config=decoder.config).layers, decoder)
    for layer in settings.layers:
        attention_module(decoder, layer)
    surround(model, parts, partial(_decode, settings), inside=True)


def _refuse_layers(layers: Any, decoder: Any) -> None:
    kinds = {
        type(layer).__name__: index
        for index, layer in reversed([*enumerate(layers)])
        if type(layer) is not DynamicLayer
    }
    for kind, index in kinds.items():
        why = "forgets what lies behind its window" if "Sliding" in kind else "is no plain list of keys and values"
        raise ModelError(
            f"{NAME}: layer {index} of {type(decoder).__name__} keeps keys and values in a {kind}, which {why}; expected "
            f"DynamicLayer in all. Leave cache_implementation out of generate, or {NAME} out of this model: feed it fewer visual "
            "tokens instead (visual_tokens)"
        )


def _decode(settings: DecodingTokens, run: Run, decoder: Any, **arguments: Any) -> Any:
    """Around each pass of the decoder."""
    past = next((arguments[name] for name in _PASTS if arguments.get(name) is not None), None)
    begun = past is not None and past.get_seq_length() > 0
    slots = getattr(past.layers[0], "slots", None) if past is not None and past.layers else None
    if begun and slots is not None:
        return _step(settings, slots, past, run, decoder, arguments)
    trains = decoder.training and torch.is_grad_enabled()
    if past is None and (trains or arguments.get("use_cache") is False):
        return run(**arguments)  # nothing is decoded behind it
    count = _tokens(arguments).shape[1]
    if decoder.visual_mask is None and count > 1:
        raise ModelError(
            f"{NAME}: the model got embeddings alone, which do not say which tokens are visual; give input_ids (or leave "
            f"{NAME} out)"
        )
    if begun and count > 1 and decoder.visual_mask.any():
        raise ModelError(
            f"{NAME}: pictures in a text that goes on from a cache; give the whole text at once, without prefill_chunk_size"
        )
    if begun:
        if decoder.decoded is not None:
            _note(decoder, torch.zeros(len(_tokens(arguments)), dtype=torch.int64))
        return run(**arguments)
    return _prompt(settings, past, run, decoder, arguments)


def _tokens(arguments: Mapping[str, Any]) -> Tensor:
    """Embeddings or ids of a pass."""
    tokens = arguments.get("inputs_embeds")
    given: Tensor = arguments["input_ids"] if tokens is None else tokens
    return given


def _note(decoder: Any, swapped: Tensor) -> None:
    decoder.decoded.events.append(swapped > 0)
    decoder.decoded.swapped.append(swapped)


@contextmanager
def _gaze(decoder: Any, layers: tuple[int, ...], look: Callable[..., Tensor]) -> Iterator[list[Tensor]]:
    """Where the pass inside the block looks, a list of one: the mean of what ``look`` finds, ``[B, N]``, over layers."""
    found: list[Tensor] = []

    def watcher(*shown: Any, **named: Any) -> None:
        with torch.no_grad():
            part = look(*shown, **named) / len(layers)
            found[:] = [found[0] + part.to(found[0].device) if found else part]

    with watch(decoder, layers, watcher):
        yield found


def _prompt(settings: DecodingTokens, past: Any, run: Run, decoder: Any, arguments: dict[str, Any]) -> Any:
    """Read a prompt, and leave in the cache what its last row looked at most."""
    visual, decoder.decoded = decoder.visual_mask, DecodingCounts()
    counts = [0] if visual is None else visual.sum(dim=1).tolist()
    sizes = [kept_count(settings.keep, count) if count else 0 for count in counts]
    if sizes == counts:
        return run(**arguments)
    real = _real(arguments.get("attention_mask"), _tokens(arguments))
    visual = visual.to(real.device) & real
    places = _positions(visual)
    order = torch.arange(real.shape[1], device=real.device)
    last = (real * order).amax(dim=1, keepdim=True)  # [B, 1]

    def look(_: Any, query: Tensor, key: Tensor, mask: Tensor | None, **named: Any) -> Tensor:
        return head_mean_attention(query, key, rows=last, keys=places, attention_mask=mask, **named)[:, 0]

    with _gaze(decoder, settings.layers, look) as found:
        outputs = run(**arguments)
    past = _cache_of(outputs) if past is None else past
    if past is None:
        return outputs
    _refuse_layers(past.layers, decoder)
    kept = best_places(
        found[0].masked_fill(places.to(found[0].device) < 0, -1.0), torch.tensor(sizes).to(found[0].device)
    )
    slots = _Slots(places, kept.to(places.device), _positions(real & ~visual), real.shape[1])
    with torch.no_grad():
        past.layers[:] = [
            _Layer(layer, slots, leads=index == 0, stash=settings.by == "shift")
            for index, layer in enumerate(past.layers)
        ]
    return outputs


def _step(settings: DecodingTokens, slots: _Slots, past: Any, run: Run, decoder: Any, arguments: dict[str, Any]) -> Any:
    """Decode one token, and once more where its gaze left what is kept."""
    count, length = _tokens(arguments).shape[1], past.get_seq_length() + 1
    if count != 1:
        raise ModelError(
            f"{NAME}: {count} tokens at once behind a prompt whose cache holds some of its visual tokens; expected one. Give the "
            "whole text as a new prompt; leave prefill_chunk_size and assistant models out"
        )
    if any(is_recorded(attention_module(decoder, layer)) for layer in settings.layers):
        raise ModelError(
            f"{NAME}: attention is recorded in a step whose cache is shorter than its text; record a pass over the whole text"
        )
    if decoder.decoded is None:
        decoder.decoded = DecodingCounts()
    given: Masks = arguments.get("attention_mask")
    arguments["attention_mask"] = _held(given, slots, length)
    if settings.by == "fixed":
        _note(decoder, torch.zeros(len(slots.kept), dtype=torch.int64))
        return run(**arguments)
    whole = given.get("full_attention") if isinstance(given, dict) else given
    visual_mask, width = _seen(whole, slots.places, length), slots.kept.shape[1]

    def look(module: Any, query: Tensor, key: Tensor, mask: Tensor, *, causal: bool, **named: Any) -> Tensor:
        """Of the step's queries, over all visual tokens and the words: what a full cache would show them."""
        visual = past.layers[module.layer_idx].visual[0]
        parts = [(visual, visual_mask.to(mask.device)), (key[:, :, width:], mask[..., width:])]
        return last_row_attention(query, parts, **named)[0]

    with _gaze(decoder, settings.layers, look) as found:
        outputs = run(**arguments)
    gaze = found[0].masked_fill(slots.places.to(found[0].device) < 0, -1.0)
    event, best = find_shift(gaze, slots.kept.to(gaze.device), settings.shift_threshold)
    event, best = event.to(slots.kept.device), best.to(slots.kept.device)
    new = (best[:, :, None] != slots.kept[:, None, :]).all(dim=2).sum(dim=1) * event  # [B]
    _note(decoder, new.cpu())
    if not event.any():
        return outputs
    slots.kept = torch.where(event[:, None], best, slots.kept)
    for layer in past.layers:
        layer.fill_slots(undo=1)
    arguments["attention_mask"] = _held(given, slots, length)
    return run(**arguments)


def _cache_of(outputs: Any) -> Any:
    """The cache among a decoder's outputs, which has another name in newer libraries; None where there is none."""
    return next(
        (one for one in (outputs.values() if hasattr(outputs, "values") else outputs) if isinstance(one, Cache)), None
    )


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Some tokens of ``[B, H, any, D]`` by index ``[B, P]``, -1 like 0: ``[B, H, P, D]``."""
    index = index.to(values.device).clamp_min(0)
    return values.gather(2, index[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))


def _positions(mask: Tensor) -> Tensor:
    """Where a mask ``[B, T]`` is True, in order: int64 ``[B, longest]``, -1 behind a sample's own."""
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(dim=1).max())]
    return order.masked_fill(~mask.gather(1, order), -1)


def _real(mask: Masks, tokens: Tensor) -> Tensor:
    """Which tokens of a prompt are no padding, bool ``[B, T]``: of a ready mask, those that see themselves."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.ndim == 4:
        own = mask[:, 0].diagonal(dim1=1, dim2=2)  # [B or 1, T]
        mask = (own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2).expand(len(tokens), -1)
    return mask.bool()


def _held(mask: Masks, slots: _Slots, length: int) -> Masks:
    """What is there of a step's mask over a text of ``length``: ``[B, 1 or heads, 1, P + decoded]``."""
    if isinstance(mask, dict):
        return {name: _seen_all(part, slots, length) for name, part in mask.items()}
    return _seen_all(mask, slots, length)


def _seen_all(mask: Tensor | None, slots: _Slots, length: int) -> Tensor:
    columns = slots.columns
    decoded = torch.arange(slots.prompt, length, device=columns.device).expand(len(columns), -1)
    return _seen(mask, torch.cat([columns, decoded], dim=1), length)


def _seen(mask: Tensor | None, columns: Tensor, length: int) -> Tensor:
    """A step's mask at some places of its text, int64 ``[B, C]``, -1: none; bool or, as it is, added ``[B, any, 1, C]``."""
    there = (columns >= 0)[:, None, None]  # [B, 1, 1, C]
    if mask is None:
        return there
    if mask.shape[-1] != length:
        raise ModelError(
            f"{NAME}: the attention mask is {list(mask.shape)} for a text of {length} tokens; give it for the whole text"
        )
    if mask.ndim == 2:
        mask = mask.bool()[:, None, None]
    index = columns.to(mask.device).clamp_min(0)[:, None, None].expand(-1, *mask.shape[1:3], -1)
    picked = mask.expand(len(columns), -1, -1, -1).gather(3, index)
    there = there.to(mask.device)
    return picked & there if mask.dtype == torch.bool else picked.masked_fill(~there, torch.finfo(mask.dtype).min)

"""A student that feeds only its best visual tokens into its language model: the change ``visual_tokens``.

The tower runs as always; around the decoder the tokens that are not chosen are left out, and so is padding that batches
need no more. What is left keeps its positions and sees what it saw; hidden states come back at their places, zeros where
nothing ran, so that everything outside sees the whole sequence. A cache of keys and values is shorter than the text, which it
does not tell (`shorter_cache`). Where every token is kept, nothing is done at all.

Dims: B batch, T tokens of this pass, L of them that run, K keys that are seen, M visual tokens of a sample, N of a batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.around import Run, surround
from vlm_distill_cache.common.models.budget import check_budget, kept_count
from vlm_distill_cache.common.models.fed_sequence import Feeding, feed
from vlm_distill_cache.common.models.tower_attention import by_visual_token, last_layer, observe_tower
from vlm_distill_cache.common.models.visual_tokens import (
    choose,
    picture_noise,
    pool_cells,
    predicted_gaze,
    repeated_places,
    split_budget,
    without_sinks,
)

WAYS = ("attention", "sinks", "gaze", "grid", "random")
_KEYS = {"keep", "by", "sink_penalty", "sinks", "gaze", "merge_frames", "seed"}
_REMEDY = "set token_selection to grid or random, or feed all visual tokens"


@dataclass(frozen=True)
class Settings:
    """What the configuration says.

    Attributes:
        keep: A share of a sample's visual tokens below 1, or their number.
        by: One of `WAYS`.
        sink_penalty: How much a sink score of 1 counts against attention.
        sinks: Score of each visual token of a picture, or of each of its tiles.
        gaze: Weights and bias of the regression that expects the logarithm of the gaze.
        merge_frames: Leave out a place that looks as in the picture before, cosine above this.
    """

    keep: float
    by: str
    sink_penalty: float = 0.03
    sinks: tuple[float, ...] | None = None
    gaze: tuple[tuple[float, ...], float] | None = None
    merge_frames: float | None = None
    seed: int = 0

    @classmethod
    def of(cls, stored: Any) -> "Settings":
        """Check what is stored.

        Raises:
            ModelError: If it says nothing that can be done.
        """
        if not isinstance(stored, Mapping) or not {"keep", "by"} <= stored.keys() <= _KEYS:
            raise _bad(f"{str(stored)[:80]!r}", f"an object with keep and by, and perhaps {', '.join(sorted(_KEYS))}")
        given = {name: value for name, value in stored.items() if value is not None}
        if given.get("by") not in WAYS:
            raise _bad(f"by {str(given.get('by'))[:80]!r}", f"one of {', '.join(WAYS)}")
        check_budget("visual_tokens", given.get("keep"))
        for name in ("sink_penalty", "merge_frames"):
            if not _is_number(given.get(name, 0.0)):
                raise _bad(f"{name} {str(given[name])[:80]!r}", "a number")
        seed, sinks, gaze = given.get("seed", 0), given.get("sinks"), given.get("gaze")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise _bad(f"seed {str(seed)[:80]!r}", "a whole number")
        if sinks is not None:
            given["sinks"] = _numbers("sinks", sinks)
        elif given["by"] == "sinks":
            raise _bad("by 'sinks' without sinks", "the sink score of each visual token, which a cache knows")
        if gaze is not None:
            if not isinstance(gaze, Mapping) or not _is_number(gaze.get("bias")):
                raise _bad(f"gaze {str(gaze)[:80]!r}", "an object with weights, a list, and bias, a number")
            given["gaze"] = (_numbers("gaze.weights", gaze.get("weights")), float(gaze["bias"]))
        return cls(**given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not value or not all(map(_is_number, value)):
        raise _bad(f"{name} {str(value)[:80]!r}", "a list of numbers")
    return tuple(float(one) for one in value)


def _bad(found: str, expected: str) -> ModelError:
    return ModelError(f"config.json: distilled.visual_tokens: {found}; expected {expected}")


@dataclass
class _Encoded:
    """What is known of the pictures that the tower encoded last.

    Attributes:
        received: Attention that places of the tower receive, as `observe_tower` gives it.
        read: What the projector read, float ``[M, T, D]``.
        tokens: Visual tokens of a tile; 0: no projector ran yet.
        grids: Of Qwen-VL's pictures: time, rows and columns of patches.
        sizes: Of LLaVA-NeXT's and OneVision's pictures; `lengths` of their visual tokens, and `tile_counts`.
        noise: Of each tile or picture, float32 ``[tokens]``.
    """

    pixels: Tensor | None = None
    received: list[Tensor] = field(default_factory=list)
    read: Tensor | None = None
    tiles: int = 0
    tokens: int = 0
    grids: Tensor | None = None
    sizes: Any = None
    lengths: tuple[int, ...] = ()
    tile_counts: tuple[int, ...] = ()
    noise: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Block:
    """Visual tokens that stand in the sequence one behind the other and form one grid.

    Attributes:
        start: Of the first, among those of the batch.
        row: int64 ``[tokens]``, -1 for the end of a line; `col` likewise.
    """

    start: int
    rows: int
    cols: int
    row: Tensor
    col: Tensor


class Pictures:
    """Takes down what a model's tower and projector do, so that scores of visual tokens can be had of it."""

    def __init__(self, model: Any, parts: Mapping[str, str]) -> None:
        """Watch a model; nothing is taken down until `by` says what for."""
        self.model, self.by, self.seed = model, "", 0
        self.tower = model.get_submodule(parts["vision_tower"])
        self.encoded: _Encoded | None = None
        self._observing = ExitStack()
        # Our own models call the layers of the library's tower themselves.
        runs = model.model.vision_tower if hasattr(model, "vision_encoder") else self.tower
        runs.register_forward_pre_hook(self._begin, with_kwargs=True)
        runs.register_forward_hook(self._end, always_call=True)
        model.get_submodule(parts["projector"]).register_forward_hook(self._project)
        inner = getattr(model, "model", model)
        if hasattr(inner, "pack_image_features"):
            inner.pictures = self
            inner.__class__ = _packing(type(inner))

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._observing.close()
        if not self.by:
            return
        pixels = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
        self.encoded = _Encoded(pixels=pixels, grids=named.get("grid_thw"))
        if self.by in ("attention", "sinks"):
            layer = last_layer(self.model.config, self.tower)
            self.encoded.received = self._observing.enter_context(observe_tower(self.tower, layer))

    def _end(self, *_: Any) -> None:
        self._observing.close()

    def _project(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        encoded = self.encoded
        if not self.by or encoded is None:
            return
        if self.by == "gaze":
            read = inputs[0].detach()
            encoded.read = read if read.ndim == 3 else read[None]
        if encoded.grids is None:
            encoded.tiles, encoded.tokens = output.shape[:2]
        if self.by == "random" and encoded.pixels is not None:
            if encoded.grids is None:
                parts, counts = list(encoded.pixels), [encoded.tokens] * encoded.tiles
            else:
                patches = encoded.grids.prod(dim=1).tolist()
                parts, counts = list(encoded.pixels.split(patches)), self._lengths()
            seed = self.seed
            encoded.noise = [picture_noise(*each, seed) for each in zip(parts, counts, strict=True)]
        encoded.pixels = None

    def packed(self, sizes: Any, tiles: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        """Take down how tiles of pictures were joined."""
        if self.encoded is not None and not self.encoded.lengths:
            self.encoded.sizes, self.encoded.tile_counts, self.encoded.lengths = sizes, tiles, lengths

    def _lengths(self) -> list[int]:
        """How many visual tokens each picture, or tile, has."""
        encoded = self.encoded
        assert encoded is not None
        if encoded.grids is not None:
            side = int(self.tower.config.spatial_merge_size)
            return [count // side**2 for count in encoded.grids.prod(dim=1).tolist()]
        return list(encoded.lengths) or [encoded.tokens] * encoded.tiles

    @property
    def count(self) -> int:
        """How many visual tokens the pictures have that were encoded last."""
        return 0 if self.encoded is None else sum(self._lengths())

    def arrange(self, values: list[Tensor]) -> Tensor:
        """Values of the tower's places ``[M, T, ...]`` as sums for the visual tokens: ``[N, ...]``."""
        encoded = self.encoded
        assert encoded is not None
        inputs: dict[str, Any] = {}
        if encoded.grids is not None:
            inputs["image_grid_thw"] = encoded.grids
        elif encoded.lengths:
            inputs |= {"image_sizes": encoded.sizes, "tile_counts": encoded.tile_counts}
        return by_visual_token(self.model, self.tower, values, inputs, tokens=self.count)

    def scores(self, settings: Settings) -> Tensor:
        """The score of each visual token, float32 ``[N]``; -inf for the ends of lines.

        Raises:
            ModelError: If something is missing, or does not fit the pictures.
        """
        encoded = self.encoded
        assert encoded is not None
        if settings.by == "random":
            found = torch.cat(encoded.noise)
            if encoded.lengths:
                found = self.arrange([torch.stack(encoded.noise)])
        elif settings.by == "gaze":
            found = self._gaze(settings)
        else:
            found = self.arrange(encoded.received)
            if settings.by == "sinks":
                found = without_sinks(found, self.sinks(settings).to(found), settings.sink_penalty)
        ends = [block.row < 0 for block in self.blocks()] if encoded.lengths else []
        return found.masked_fill(torch.cat(ends).to(found.device), -torch.inf) if ends else found

    def _gaze(self, settings: Settings) -> Tensor:
        encoded = self.encoded
        assert encoded is not None
        if settings.gaze is None:
            raise _bad(
                "by 'gaze' without gaze", "the regression's weights and bias, or scores that are given (`scores_given`)"
            )
        assert encoded.read is not None
        weights, bias = settings.gaze
        if len(weights) != encoded.read.shape[-1]:
            raise _bad(
                f"{len(weights)} gaze.weights", f"{encoded.read.shape[-1]}, the width of what the projector reads"
            )
        expected = predicted_gaze(encoded.read, torch.tensor(weights, device=encoded.read.device), 0.0)
        return self.mean(expected) + bias

    def mean(self, values: Tensor) -> Tensor:
        """Values of the tower's places ``[M, T, ...]`` as means for the visual tokens: float32 ``[N, ...]``."""
        values = values.float()
        shares = self.arrange([torch.ones_like(values)])
        return self.arrange([values]) / shares.clamp_min(torch.finfo(torch.float32).tiny)

    def sinks(self, settings: Settings) -> Tensor:
        """The sink score of each visual token, float32 ``[N]``; 0 where there are none.

        Raises:
            ModelError: If the scores are those of another grid.
        """
        if settings.sinks is None:
            return torch.zeros(self.count)
        lengths, known = self._lengths(), len(settings.sinks)
        blocks = [len(block.row) for block in self.blocks()]
        if not all(count == known for count in lengths) and not all(count == known for count in blocks):
            raise _bad(
                f"{known} sinks", f"one for each of the {sorted({*lengths})} visual tokens of a picture; {_REMEDY}, or take "
                "the sinks of a cache with this student's grid"
            )  # fmt: skip
        return torch.tensor(settings.sinks).repeat(self.count // known)

    def blocks(self) -> list[_Block]:
        """The grids that the visual tokens form, in the order of the sequence.

        Raises:
            ModelError: If tokens of a tile form no square.
        """
        encoded = self.encoded
        assert encoded is not None
        if encoded.grids is not None:
            side = int(self.tower.config.spatial_merge_size)
            shapes = [(t * (rows // side), cols // side) for t, rows, cols in encoded.grids.tolist()]
            return _in_order([_grid(rows, cols) for rows, cols in shapes])
        side = next((s for s in range(1, 10_000) if s**2 >= encoded.tokens), 1)
        if side**2 - encoded.tokens not in (0, 1):
            raise ModelError(
                f"a tile has {encoded.tokens} visual tokens, which form no square (or one without its first place): how they "
                "lie is not known; feed all visual tokens of this student"
            )
        tile = _grid(side, side)
        tile = (
            side,
            side,
            tile[2][-encoded.tokens :],
            tile[3][-encoded.tokens :],
        )  # CompoDistill drops the first place
        if not encoded.lengths:
            return _in_order([tile] * encoded.tiles)
        is_place = self.arrange([torch.ones(encoded.tiles, encoded.tokens)]) > 0
        found, start = [], 0
        for length, tiles in zip(encoded.lengths, encoded.tile_counts, strict=True):
            found.append(tile)
            rest = is_place[start + encoded.tokens : start + length]
            start += length
            if tiles == 1 and len(rest):
                found.append((1, 1, torch.full((len(rest),), -1), torch.full((len(rest),), -1)))
            elif len(rest):
                cols = int((~rest).nonzero()[0]) if bool((~rest).any()) else len(rest)
                rows = len(rest) // (cols + 1)
                row, col = torch.arange(rows * (cols + 1)) // (cols + 1), torch.arange(rows * (cols + 1)) % (cols + 1)
                found.append((rows, cols, row.masked_fill(~rest, -1), col.masked_fill(~rest, -1)))
        return _in_order(found)


_Grid = tuple[int, int, Tensor, Tensor]


def _grid(rows: int, cols: int) -> _Grid:
    index = torch.arange(rows * cols)
    return rows, cols, index // cols, index % cols


def _in_order(grids: list[_Grid]) -> list[_Block]:
    blocks, start = [], 0
    for rows, cols, row, col in grids:
        blocks.append(_Block(start, rows, cols, row, col))
        start += len(row)
    return blocks


def _packing(inner_class: Any) -> Any:
    """A class of the library that joins tiles of pictures, which tells how it did."""
    if hasattr(inner_class, "pictures"):
        return inner_class

    def pack_image_features(self: Any, image_features: Any, image_sizes: Any, *others: Any, **named: Any) -> Any:
        found = inner_class.pack_image_features(self, image_features, image_sizes, *others, **named)
        if self.pictures is not None:
            self.pictures.packed(
                image_sizes, tuple(len(tiles) for tiles in image_features), tuple(len(tokens) for tokens in found[0])
            )
        return found

    body = {"pack_image_features": pack_image_features, "pictures": None, "__module__": inner_class.__module__}
    return type(inner_class.__name__, (inner_class,), body)


class FewerTokens:
    """The function around a decoder that leaves visual tokens out; one a model, with settings or without (all are fed)."""

    def __init__(self, model: Any, parts: Mapping[str, str]) -> None:
        """Watch a model's passes."""
        self.settings: Settings | None = None
        self.given: Tensor | None = None
        self.shows = False
        self.pictures = Pictures(model, parts)
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def set(self, settings: Settings | None) -> None:
        """Feed as settings say; None: feed all."""
        self.settings = settings
        self.pictures.by = "" if settings is None else settings.by
        self.pictures.seed = 0 if settings is None else settings.seed

    def _look(self, model: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Whether the pass that begins reads pictures."""
        before = named.get("mm_encoder_outputs") or {}
        images = before.get("image") if isinstance(before, Mapping) else before
        self.shows = named.get("pixel_values") is not None or images is not None
        videos = named.get("pixel_values_videos") is not None or (isinstance(before, Mapping) and before.get("video"))
        if self.settings is not None and videos:
            raise ModelError("a student that feeds fewer visual tokens reads no videos; give their frames as pictures")

    def __call__(self, run: Run, decoder: Any, **arguments: Any) -> Any:
        """Run the decoder on what is chosen."""
        decoder.places = decoder.stands_for = None
        stands_for = None
        if self.settings is not None and self.shows:
            if decoder.visual_mask is None:
                raise ModelError(
                    "a student that feeds fewer visual tokens must know where they are: give input_ids, not inputs_embeds"
                )
            stands_for = self._decide(decoder.visual_mask, arguments, self.settings)
        feeding = Feeding.of(decoder, arguments, stands_for)
        return run(**arguments) if feeding is None else feed(feeding, run, decoder, arguments)

    def _decide(self, visual: Tensor, arguments: Mapping[str, Any], settings: Settings) -> Tensor | None:
        """Which token of the pass stands for each: int64 ``[B, T]``, -1 for none; None: all stay."""
        counts = visual.sum(dim=1).tolist()
        budgets = [kept_count(settings.keep, count) for count in counts]
        if settings.merge_frames is None and all(k >= n for k, n in zip(budgets, counts, strict=True)):
            return None
        copies = self._copies(counts)
        rows = [b for b in range(0, len(counts), copies) if counts[b]]
        alone = [counts[b] for b in rows]
        repeated = self._repeated(visual[rows], arguments["inputs_embeds"][rows], alone, settings)
        if settings.by == "grid":
            local = self._pooled(alone, [budgets[b] for b in rows])
            local = local.to(visual.device).masked_fill(repeated, -1)
        else:
            scores = self._scores(rows, alone, settings).to(visual.device)
            best = choose(scores.masked_fill(repeated, -torch.inf), [budgets[b] for b in rows])
            whole = torch.tensor([budgets[b] >= counts[b] for b in rows], device=visual.device)
            kept = (best | whole[:, None]) & ~repeated
            local = torch.where(kept, torch.arange(kept.shape[1], device=kept.device), -1)  # [rows, M]
        result = torch.arange(visual.shape[1], device=visual.device).repeat(len(counts), 1)
        for at, b in enumerate(rows):
            places = visual[b].nonzero()[:, 0]  # [M]
            chosen = local[at, : alone[at]]
            stands = torch.where(chosen < 0, -1, places[chosen.clamp_min(0)])
            for copy in range(b, b + copies):  # beams of one sample
                result[copy, visual[copy]] = stands
        return result

    def _copies(self, counts: list[int]) -> int:
        """How often each sample stands in the batch: several times in a row, for beams, with pictures encoded once."""
        known, found = self.pictures.count, sum(counts)
        copies = found // known if known else 1
        if known and (found != known * copies or len(counts) % copies):
            raise ModelError(
                f"the sequence holds {found} visual tokens, the pictures that the tower encoded last have {known}; run the model "
                "over the pictures that it encoded last, with all their tokens in one pass"
            )
        if not known and self.given is None:
            raise ModelError("visual tokens without pictures that the tower encoded: give pixel_values")
        if any(len({*counts[b : b + copies]}) > 1 for b in range(0, len(counts), copies)):
            raise ModelError("samples that are repeated in a batch must follow one another, as beams do")
        return copies

    def _scores(self, rows: list[int], counts: list[int], settings: Settings) -> Tensor:
        """Scores of samples with pictures, float32 ``[rows, M]``, padded with -inf."""
        given = self.given
        result = torch.full((len(rows), max(counts)), -torch.inf)
        complete = given is not None and all(
            bool(given[b, :n].isfinite().all()) for b, n in zip(rows, counts, strict=True)
        )
        own = None if complete else self.pictures.scores(settings).cpu()
        start = 0
        for at, (b, count) in enumerate(zip(rows, counts, strict=True)):
            scores = given[b, :count].detach().float().cpu() if given is not None else None
            if scores is None or not bool(scores.isfinite().all()):
                assert own is not None
                scores = own[start : start + count]
            result[at, :count] = scores
            start += count
        return result

    def _pooled(self, counts: list[int], budgets: list[int]) -> Tensor:
        """Which of its visual tokens stands for each of a sample's, int64 ``[rows, M]``."""
        result, start = torch.full((len(counts), max(counts)), -1), 0
        blocks = self.pictures.blocks()
        for at, (count, k) in enumerate(zip(counts, budgets, strict=True)):
            own = [block for block in blocks if start <= block.start < start + count]
            if k >= count:
                result[at, :count] = torch.arange(count)
            else:
                shares = split_budget([int((block.row >= 0).sum()) for block in own], k)
                for block, share in zip(own, shares, strict=True):
                    if share:
                        first = block.start - start
                        stands = pool_cells(block.row, block.col, block.rows, block.cols, share)
                        result[at, first : first + len(stands)] = torch.where(stands < 0, -1, stands + first)
            start += count
        return result

    def _repeated(self, visual: Tensor, embeds: Tensor, counts: list[int], settings: Settings) -> Tensor:
        """Places that look as in the picture before, bool ``[rows, M]``."""
        result = torch.zeros(len(counts), max(counts), dtype=torch.bool, device=visual.device)
        if settings.merge_frames is None:
            return result
        sinks, blocks, start = self.pictures.sinks(settings), self.pictures.blocks(), 0
        for at, count in enumerate(counts):
            runs = _runs(visual[at])
            ends = [sum(length for _, length in runs[: i + 1]) for i in range(len(runs))]
            shapes = [
                [(b.rows, b.cols) for b in blocks if start + end - length <= b.start < start + end]
                for (_, length), end in zip(runs, ends, strict=True)
            ]
            for i in range(1, len(runs)):
                if shapes[i] != shapes[i - 1]:
                    continue
                pair = torch.stack([embeds[at, a : a + length] for a, length in runs[i - 1 : i + 1]]).detach()
                of_place = sinks[start + ends[i] - runs[i][1] : start + ends[i]].to(pair.device)
                found = repeated_places(pair, of_place, above=settings.merge_frames)[1]
                result[at, ends[i] - runs[i][1] : ends[i]] = found
            start += count
        return result


def _runs(visual: Tensor) -> list[tuple[int, int]]:
    """Begin and length of each run of True, bool ``[T]``."""
    changes = torch.diff(
        visual.int(), prepend=torch.zeros(1, device=visual.device), append=torch.zeros(1, device=visual.device)
    )
    begins, ends = (changes > 0).nonzero()[:, 0].tolist(), (changes < 0).nonzero()[:, 0].tolist()
    return [(begin, end - begin) for begin, end in zip(begins, ends, strict=True)]


def selector_of(model: Any) -> FewerTokens | None:
    """What chooses a model's visual tokens, wrapped or not; None where nothing does."""
    for module in model.modules():
        for wrapper in getattr(module, "wrappers", ()):
            if isinstance(wrapper, FewerTokens):
                return wrapper
    return None


def apply_visual_tokens(model: Any, parts: Mapping[str, str], stored: Any) -> None:
    """Let a model feed fewer visual tokens from now on; None takes it back.

    Raises:
        ModelError: If what is stored cannot be done for this model.
    """
    settings = None if stored is None else Settings.of(stored)
    if settings is not None:
        if missing := [name for name in ("language_model", "vision_tower", "projector") if not parts.get(name)]:
            raise ModelError(
                f"model_type {model.config.model_type!r}: where its {missing[0]} is, is not known (data/families/table.py), so "
                "it cannot feed fewer visual tokens; feed all (visual_tokens=none)"
            )
        if settings.merge_frames is not None and model.config.model_type in ("idefics3", "smolvlm"):
            raise ModelError(
                f"merge_frames: tiles of one picture look like pictures of their own to {model.config.model_type}, so frames "
                "cannot be told from them; leave merge_frames out"
            )
    found = selector_of(model)
    if found is None:
        found = FewerTokens(model, parts)
        surround(model, parts, found)
    found.set(settings)


@contextmanager
def scores_given(model: Any, scores: Tensor | None) -> Iterator[None]:
    """Choose visual tokens by these scores, instead of the model's own, in the passes inside the block.

    Args:
        model: Wrapped or not; one that feeds all visual tokens is left alone.
        scores: Float ``[B, M]``, of each sample's visual tokens in their order; a sample that has none is NaN (or -inf)
            throughout, and so is padding. None: the model's own.
    """
    found = selector_of(model)
    if found is None:
        yield
        return
    found.given = scores
    try:
        yield
    finally:
        found.given = None


class _EncodedError(Exception):
    """Pictures are encoded, and the decoder need not run: no error at all."""


@torch.no_grad()
def tower_features(model: Any, parts: Mapping[str, str], inputs: Mapping[str, Any]) -> list[Tensor]:
    """What the gaze is expected from: what the projector reads, averaged over the places of each visual token.

    Args:
        inputs: The model's arguments, with ``input_ids``.

    Returns:
        Of each sample with a picture float32 ``[M, D]``; 0 at the ends of lines.
    """
    if selector_of(model) is None:
        apply_visual_tokens(model, parts, None)
    selector = selector_of(model)
    assert selector is not None
    pictures = selector.pictures
    by, pictures.by = pictures.by, "gaze"
    try:
        if hasattr(model, "vision_encoder"):
            model.model.mm_projector(model.model.vision_tower(inputs["pixel_values"]))
        else:
            decoder = model.get_submodule(parts["language_model"])

            def stop(*_: Any) -> None:
                raise _EncodedError

            handle = decoder.register_forward_pre_hook(stop)
            try:
                model(**inputs)
            except _EncodedError:
                pass
            finally:
                handle.remove()
        assert pictures.encoded is not None
        assert pictures.encoded.read is not None
        features = pictures.mean(pictures.encoded.read)
    finally:
        pictures.by = by
        pictures.encoded = None
    counts = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    return [part for part in features.split(counts) if len(part)]

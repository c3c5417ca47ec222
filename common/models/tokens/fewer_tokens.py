"""A student that feeds only its best visual tokens into its language model: the change ``visual_tokens``.

The tower runs as always; around the decoder the tokens that are not chosen are left out, and so is padding that batches
need no more. What is left keeps its positions and sees what it saw; hidden states come back at their places, zeros where
nothing ran, so that everything outside sees the whole sequence. A cache of keys and values is shorter than the text, which it
does not tell (`shorter_cache`). Where every token is kept, nothing is done at all.

Dims: B batch, T tokens of this pass, L of them that run, K keys that are seen, M visual tokens of a sample, N of a batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.around import Run, by_name, reader_of, surround
from vlm_distill_cache.common.models.tokens.budget import kept_count
from vlm_distill_cache.common.models.tokens.fed_sequence import Feeding, feed
from vlm_distill_cache.common.models.tokens.token_settings import Settings
from vlm_distill_cache.common.models.tokens.tower_pictures import Pictures
from vlm_distill_cache.common.models.tokens.visual_tokens import (
    choose,
    pool_cells,
    repeated_places,
    split_budget,
    without,
)


class FewerTokens:
    """The function around a decoder that leaves visual tokens out; one a model, with settings or without (all are fed)."""

    def __init__(self, model: Any, parts: Mapping[str, str]) -> None:
        """Watch a model's passes."""
        self.settings: Settings | None = None
        self.given: Tensor | None = None
        self.needed: Tensor | None = None
        self.labelled: Tensor | None = None
        self.shows = False
        self.decoder: Any = None
        self.pictures = Pictures(model, parts)
        reader_of(model).register_forward_pre_hook(self._look, with_kwargs=True)
        if reader_of(model) is not model:
            model.register_forward_pre_hook(self._look_at_labels, with_kwargs=True)

    def set(self, settings: Settings | None) -> None:
        """Feed as settings say; None: feed all."""
        self.settings = settings
        self.pictures.by = "" if settings is None else settings.by
        self.pictures.seed = 0 if settings is None else settings.seed

    def _look(self, model: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Whether the pass that begins reads pictures."""
        named = by_name(model, inputs, named)
        before = named.get("mm_encoder_outputs") or {}
        images = before.get("image") if isinstance(before, Mapping) else before
        self.shows = named.get("pixel_values") is not None or images is not None
        videos = named.get("pixel_values_videos") is not None or (isinstance(before, Mapping) and before.get("video"))
        if self.settings is not None and videos:
            raise ModelError("a student that feeds fewer visual tokens reads no videos; give their frames as pictures")

    def _look_at_labels(self, model: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Which tokens a loss asks for the next one, of ``labels`` as the library shifts them."""
        labels = by_name(model, inputs, named).get("labels")
        self.labelled = None if labels is None else F.pad(labels[:, 1:] >= 0, (0, 1))

    def __call__(self, run: Run, decoder: Any, **arguments: Any) -> Any:
        """Run the decoder on what is chosen."""
        decoder.places = decoder.stands_for = stands_for = None
        labelled, self.labelled = self.labelled, None
        if self.settings is not None and self.shows:
            if decoder.visual_mask is None:
                raise ModelError(
                    "a student that feeds fewer visual tokens must know where they are: give input_ids, not inputs_embeds"
                )
            stands_for = self._decide(decoder.visual_mask, arguments, self.settings, labelled)
        feeding = Feeding.of(decoder, arguments, stands_for)
        return run(**arguments) if feeding is None else feed(feeding, run, decoder, arguments)

    def _decide(
        self, visual: Tensor, arguments: Mapping[str, Any], settings: Settings, labelled: Tensor | None
    ) -> Tensor | None:
        """Which token of the pass stands for each: int64 ``[B, T]``, -1 for none; None: all stay."""
        counts = visual.sum(dim=1).tolist()
        budgets = [kept_count(settings.keep, count) for count in counts]
        if settings.merge_frames is None and all(k >= n for k, n in zip(budgets, counts, strict=True)):
            return None
        copies = self._copies(counts)
        rows = [b for b in range(0, len(counts), copies) if counts[b]]
        alone = [counts[b] for b in rows]
        needed = self._needed(visual, labelled)[rows]  # [rows, T]
        asked = torch.zeros(len(rows), max(alone, default=0), dtype=torch.bool, device=visual.device)
        for at, b in enumerate(rows):
            asked[at, : alone[at]] = needed[at, visual[b]]
        repeated = ~asked & self._repeated(visual[rows], arguments["inputs_embeds"][rows], alone, settings)
        if settings.by == "grid":
            local = self._pooled(alone, [budgets[b] for b in rows])
            local = without(local.to(visual.device), repeated)
            local = torch.where(asked, torch.arange(local.shape[1], device=local.device), local)
        else:
            scores = self._scores(rows, alone, settings).to(visual.device)
            scores = scores.masked_fill(repeated, -torch.inf).masked_fill(asked, torch.inf)
            best = choose(scores, [budgets[b] for b in rows])
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

    def _needed(self, visual: Tensor, labelled: Tensor | None) -> Tensor:
        """Visual tokens that must run, since what they say is asked for: no word stands between them and an answer."""
        found = visual & ~F.pad(visual[:, 1:], (0, 1))  # each picture's last
        found[:, :-1] &= False if labelled is None else labelled[:, :-1].to(visual.device)
        return found if self.needed is None else found | (visual & self.needed.to(visual.device))

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
    for module in getattr(model, "modules", list)():
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
    if found is not None or settings is not None:
        (found or _watch(model, parts)).set(settings)


def _watch(model: Any, parts: Mapping[str, str]) -> FewerTokens:
    found = FewerTokens(model, parts)
    found.decoder = surround(model, parts, found)
    return found


@contextmanager
def rows_needed(model: Any, rows: Tensor) -> Iterator[None]:
    """Feed these visual tokens in any case, in the pass inside the block: what they say is asked for.

    Args:
        model: As of `scores_given`.
        rows: Bool ``[B, T]``; of other tokens it says nothing.
    """
    found = selector_of(model)
    if found is not None:
        found.needed = rows
    try:
        yield
    finally:
        if found is not None:
            found.needed = None


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
    pictures = (selector_of(model) or _watch(model, parts)).pictures
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

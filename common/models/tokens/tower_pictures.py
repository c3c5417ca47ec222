"""What a model's tower and projector do with pictures, taken down: scores of visual tokens, and the grids that they form.

Dims: M pictures or tiles that the tower reads, T places of the tower, N visual tokens of a batch, D width.
"""

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.around import reader_of, remade
from vlm_distill_cache.common.models.tokens.token_settings import REMEDY, Settings, refusal
from vlm_distill_cache.common.models.tokens.tower_attention import by_visual_token, last_layer, observe_tower
from vlm_distill_cache.common.models.tokens.visual_tokens import picture_noise, predicted_gaze, without_sinks


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


class _Hook:
    """A method of `Pictures` as a hook: a copy of the hooked part alone (an adapter's of a projector) tells the same ones."""

    def __init__(self, pictures: "Pictures", method: str) -> None:
        self.pictures, self.method = pictures, method

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return getattr(self.pictures, self.method)(*inputs, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        model = self.pictures.model
        whole = any(id(one) in memo for one in (self.pictures, model, reader_of(model)))
        return _Hook(copy.deepcopy(self.pictures, memo) if whole else self.pictures, self.method)


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
        runs.register_forward_pre_hook(_Hook(self, "_begin"), with_kwargs=True)
        runs.register_forward_hook(_Hook(self, "_end"), always_call=True)
        model.get_submodule(parts["projector"]).register_forward_hook(_Hook(self, "_project"))
        inner = reader_of(model)
        if hasattr(inner, "pack_image_features"):
            inner.pictures = self
            inner_class: Any = type(inner)
            inner.__class__ = _packing(inner_class)

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._observing.close()
        if not self.by:
            return
        pixels = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
        self.encoded = _Encoded(pixels=pixels, grids=named.get("grid_thw"))
        if self.by in ("attention", "sinks"):
            layer = last_layer(self.model.config, module)
            self.encoded.received = self._observing.enter_context(observe_tower(module, layer))

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
            raise refusal(
                "by 'gaze' without gaze", "the regression's weights and bias, or scores that are given (`scores_given`)"
            )
        assert encoded.read is not None
        weights, bias = settings.gaze
        if len(weights) != encoded.read.shape[-1]:
            raise refusal(
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
            raise refusal(
                f"{known} sinks", f"one for each of the {sorted({*lengths})} visual tokens of a picture; {REMEDY}, or take "
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


@cache
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

    def reduced(self: Any, protocol: Any) -> Any:
        return remade, (_packing, inner_class), self.__dict__

    body = {
        "pack_image_features": pack_image_features,
        "pictures": None,
        "__reduce_ex__": reduced,
        "__module__": inner_class.__module__,
    }
    return type(inner_class.__name__, (inner_class,), body)

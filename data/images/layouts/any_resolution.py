"""LLaVA-NeXT and LLaVA-OneVision: the whole picture small, then its tiles joined to one large grid of tokens.

The picture is scaled to fit the best of a list of resolutions, centred on black, and cut into the tower's
squares. The model joins their tokens to one grid, cuts the rows or columns off that hold padding only, ends each
row with one learnt *newline* token and puts the small picture's tokens in front. OneVision shrinks a grid of more
than `most_tiles` tiles' worth of tokens (`anyres_max_9`).

A newline token is an image token without a picture: the grid's tile has one more column, beyond the picture's
right edge, where `content_mask` finds padding.

Frames of a video are scaled to one tile each and their tokens pooled (LLaVA-OneVision, LLaVA-NeXT-Video).

Where patches do not fill a tile (SigLIP), the joined grid has a gap of a few pixels at each seam. Its tokens are
taken as evenly spaced from the first to the last one's edge: none is off by more than half a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import ClassVar

import numpy as np
import PIL.Image
from transformers.image_processing_utils import select_best_resolution

from vlm_distill_cache.common.attention.tiles import Tile
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.common.pixels.rgb import MAX_PIXELS
from vlm_distill_cache.data.images.encoder import (
    EncodedImage,
    check_settings,
    plain_size,
    prepare_picture,
    unusable_settings,
)
from vlm_distill_cache.data.images.layouts.pixels import (
    MOST_SIDE,
    Layout,
    check_processor,
    count_setting,
    covered_share,
    tile_array,
    whole,
)
from vlm_distill_cache.data.images.layouts.videos import BESIDE, FixedFrames, unread_videos
from vlm_distill_cache.data.sample import Frame

SHRINKS_ABOVE = 1.1
"""OneVision shrinks a grid whose side is more than this times the largest allowed one's."""


@dataclass(frozen=True, kw_only=True)
class AnyResolutionEncoder(Layout):
    """`LlavaNextImageProcessorPil` or `LlavaOnevisionImageProcessorPil` with the geometry that the model adds.

    The processor's ``image_grid_pinpoints`` must be the model's.

    Attributes:
        patch_size: Pixels per side of a patch of the vision tower.
        most_tiles: Tiles' worth of tokens the joined grid may have (OneVision's ``anyres_max_9``: 9); None:
            any number (LLaVA-NeXT).
        frames: How frames of a video are read; None: as so many pictures.
    """

    patch_size: int
    most_tiles: int | None = None
    frames: FixedFrames | None = None

    kind: ClassVar[str] = "any_resolution"
    keys: ClassVar[tuple[str, ...]] = ("image_grid_pinpoints",)

    def __post_init__(self) -> None:
        check_processor(self.processor, "image_grid_pinpoints", "size")
        if self.patch_size < 1 or self.side < self.patch_size:
            raise ConfigError(f"patch_size must be 1..{self.side} pixels (a tile's side), got {self.patch_size}")
        size, crop = self._tile_sizes
        if size.get("height", 0) != size.get("width", 0) or crop.get("height", 0) != crop.get("width", 0):
            raise unusable_settings(self.processor, "tiles must be squares")
        short = size.get("shortest_edge", 0)
        resized = size.get("height") or min(short, size.get("longest_edge", short))
        if resized != self.side:
            raise unusable_settings(
                self.processor,
                f"tiles are cut at {self.side} pixels and scaled to {resized}, so that visual tokens would not lie side by "
                "side; size and crop_size must agree",
            )
        pairs = self.processor.image_grid_pinpoints
        if not isinstance(pairs, list | tuple) or not pairs or not all(map(_is_resolution, pairs)):
            raise unusable_settings(
                self.processor, f"image_grid_pinpoints is {pairs!r}, expected a list of [height, width] in pixels"
            )
        wrong = [pair for pair in self.processor.image_grid_pinpoints if any(edge % self.side for edge in pair)]
        if wrong:
            raise ConfigError(
                f"image_grid_pinpoints {wrong} are no multiples of a tile's side, {self.side} pixels; they must be "
                "those of the checkpoint's config.json, with the size and crop_size of its preprocessor_config.json"
            )
        check_settings(self)

    @property
    def side(self) -> int:
        """Pixels per side of a tile."""
        size, crop = self._tile_sizes
        return count_setting(
            self.processor,
            crop.get("height") or size.get("height") or size.get("shortest_edge"),
            "shortest_edge (or height and width) of size",
            most=MOST_SIDE,
        )

    @property
    def _tile_sizes(self) -> tuple[dict[str, int], dict[str, int]]:
        """What size and crop_size say."""
        size, crop = (getattr(self.processor, name, None) for name in ("size", "crop_size"))
        return plain_size(self.processor, size, "size"), plain_size(self.processor, crop, "crop_size")

    @property
    def base_grid(self) -> tuple[int, int]:
        """Rows and columns of one tile's tokens."""
        return (self.side // self.patch_size,) * 2

    @property
    def least_token_count(self) -> int:
        """No picture has fewer visual tokens: the small picture's."""
        return self.base_grid[0] * self.base_grid[1]

    @property
    def token_count(self) -> int:
        """Most visual tokens of a picture: the largest of the resolutions, without padding."""
        base, most = self.base_grid[0], 0
        for height, width in self.processor.image_grid_pinpoints:
            rows, cols = height // self.side * base, width // self.side * base
            area = rows * cols
            if self.most_tiles is not None:  # with padding cut off, a grid may just escape the shrinking
                area = min(area, int(SHRINKS_ABOVE**2 * self.most_tiles * base**2))
            most = max(most, area + rows)
        return self.least_token_count + most

    def __call__(self, image: PIL.Image.Image) -> EncodedImage:
        """Turn one RGB picture into model input.

        Returns:
            ``pixel_values`` f4 ``[tiles, 3, H, W]``, ``image_sizes`` i8 ``[1, 2]`` (height, width), and one or two
            tiles: the small picture, and the joined grid with its newline column.
        """
        output = prepare_picture(self.processor, image)
        pixels = tile_array(output["pixel_values"][0], side=self.side)
        sizes = np.array([[image.height, image.width]], dtype=np.int64)
        small = whole(self.base_grid, covered_share(self.side, self.patch_size))
        joined = self._joined(image.height, image.width)
        return EncodedImage(
            inputs={"pixel_values": pixels, "image_sizes": sizes},
            tiles=(small,) if joined is None else (small, joined),
        )

    def among(self, pictures: int) -> Callable[[PIL.Image.Image], EncodedImage]:
        """How each picture of a sample with so many is encoded."""
        return self if pictures == 1 or self.most_tiles is None else self._whole

    def _whole(self, image: PIL.Image.Image) -> EncodedImage:
        """One of OneVision's several: ``pixel_values`` f4 ``[1, 3, H, W]``, its tile, and the newline's."""
        longest = max(image.size)
        if longest**2 > MAX_PIXELS:
            raise SampleError(
                f"an image of {image.width} x {image.height} pixels would be padded to {longest} x {longest}, more than the "
                f"{MAX_PIXELS} pixels allowed; crop it first"
            )
        output = prepare_picture(self.processor, image, among=True)
        share = covered_share(self.side, self.patch_size)
        low = [-((longest - edge) // 2) / edge for edge in image.size]
        high = [start + longest / edge * share for start, edge in zip(low, image.size, strict=True)]
        tile = Tile(rows=self.base_grid[0], cols=self.base_grid[1], region=(low[0], low[1], high[0], high[1]))
        return EncodedImage(
            inputs={
                "pixel_values": tile_array(output["pixel_values"][0], side=self.side),
                "image_sizes": np.array([[image.height, image.width]], dtype=np.int64),
            },
            tiles=(tile, Tile(rows=1, cols=1, region=BESIDE)),
        )

    def video(self, frames: Sequence[Frame]) -> EncodedImage:
        """Turn the frames of one video into model input.

        Returns:
            ``pixel_values_videos`` f4 ``[1, F, 3, H, W]`` where a newline ends each video, so that a model must know how many
            frames each has; else ``[F, 3, H, W]`` (`data.families.inputs.frame_inputs`). And a tile a frame.
        """
        if self.frames is None:
            raise unread_videos(self)
        pixels, tiles = self.frames(frames)
        pixels = pixels[None] if self.frames.newline else pixels
        return EncodedImage(inputs={"pixel_values_videos": pixels}, tiles=tiles)

    def _joined(self, height: int, width: int) -> Tile | None:
        """The tokens of the large picture, newlines included; None if the cut leaves no row."""
        best = select_best_resolution((height, width), self.processor.image_grid_pinpoints)
        base = self.base_grid[0]
        full = (best[0] // self.side * base, best[1] // self.side * base)  # rows, columns of all tiles
        # As `unpad_image` of the model: how many rows or columns at each side are all padding, in tokens.
        if width / height > full[1] / full[0]:
            cut = ((full[0] - int(round(height * (full[1] / width), 7))) // 2, 0)
        else:
            cut = (0, (full[1] - int(round(width * (full[0] / height), 7))) // 2)
        kept = (full[0] - 2 * cut[0], full[1] - 2 * cut[1])
        if kept[0] < 1:
            return None
        if kept[1] < 1:  # a picture one pixel wide: the model still ends each row with its newline
            return Tile(rows=kept[0], cols=1, region=BESIDE)
        shown = _fitted(height, width, best)
        low, high = [], []
        for axis in (0, 1):
            covered = best[axis] - self.side + self.base_grid[0] * self.patch_size  # pixels, first to last token
            token = covered / full[axis]
            margin = (best[axis] - shown[axis]) // 2  # black pixels in front of the picture
            low.append((cut[axis] * token - margin) / shown[axis])
            high.append(((cut[axis] + kept[axis]) * token - margin) / shown[axis])
        # The last column reaches the picture's edge at least: a newline must not see a strip of it.
        right = max(high[1], 1.0)
        rows, cols = self._shrunk(*kept)
        if min(rows, cols) < 1:
            raise SampleError(
                f"an image of {width} x {height} pixels is so long that its model shrinks it to {rows} x {cols} visual "
                "tokens; crop it first"
            )
        newline = (right - low[1]) / cols
        return Tile(rows=rows, cols=cols + 1, region=(low[1], low[0], right + newline, high[0]))

    def _shrunk(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns after OneVision's interpolation."""
        if self.most_tiles is None:
            return rows, cols
        ratio = sqrt(rows * cols / (self.most_tiles * self.base_grid[0] ** 2))
        return (int(rows // ratio), int(cols // ratio)) if ratio > SHRINKS_ABOVE else (rows, cols)


def _is_resolution(pair: object) -> bool:
    return (
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(edge, int) and not isinstance(edge, bool) and edge > 0 for edge in pair)
    )


def _fitted(height: int, width: int, best: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of a picture scaled to fit a resolution, as the processor scales it."""
    scale_h, scale_w = best[0] / height, best[1] / width
    if scale_w < scale_h:
        return min(ceil(height * scale_w), best[0]), best[1]
    return best[0], min(ceil(width * scale_h), best[1])

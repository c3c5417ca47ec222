"""InternVL: up to twelve tiles in the arrangement nearest the picture's shape, then a thumbnail of the whole.

The picture is stretched to whole tiles, so there is no padding. All visual tokens stand in one run between two
tags, tile after tile. A frame of a video is one tile, with its number in front.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import PIL.Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.data.images.encoder import EncodedImage, check_settings, plain_size, prepare_picture
from vlm_distill_cache.data.images.layouts.pixels import (
    MOST_SIDE,
    Layout,
    check_processor,
    count_setting,
    tile_array,
    tiled,
    whole,
)
from vlm_distill_cache.data.images.layouts.videos import FixedFrames, unread_videos
from vlm_distill_cache.data.sample import Frame


@dataclass(frozen=True, kw_only=True)
class ThumbnailEncoder(Layout):
    """`GotOcr2ImageProcessorPil` as InternVL's processor calls it, with geometry and prompt text.

    Attributes:
        grid: Rows and columns of one tile's visual tokens, after the pixel shuffle.
        crops: Cut the picture into tiles. The library's `InternVLProcessor` does, whatever ``crop_to_patches``
            its image processor has stored.
        image_token: The text of one visual token.
        before: Text in front of the visual tokens.
        after: Text behind them.
        frames: How frames of a video are read; None: as so many pictures.
    """

    grid: tuple[int, int]
    crops: bool = True
    image_token: str = "<IMG_CONTEXT>"
    before: str = "<img>"
    after: str = "</img>"
    frames: FixedFrames | None = None

    kind: ClassVar[str] = "thumbnail"
    keys: ClassVar[tuple[str, ...]] = ("min_patches", "max_patches")
    writes_text: ClassVar[bool] = True
    written_video: ClassVar[str | None] = "<video>"

    def __post_init__(self) -> None:
        check_processor(self.processor, "min_patches", "max_patches")
        size = plain_size(self.processor, self.processor.size, "size")
        for name in ("min_patches", "max_patches"):
            count_setting(self.processor, getattr(self.processor, name), name)
        if min(self.grid) < 1 or not size.get("height") or size["height"] != size.get("width"):
            raise ConfigError(
                f"tiles must be squares of at least 1 x 1 visual tokens, got size={size}, grid={self.grid}; "
                "expected height and width of size in preprocessor_config.json to be one number"
            )
        check_settings(self)

    @property
    def side(self) -> int:
        """Pixels per side of a tile."""
        size = plain_size(self.processor, self.processor.size, "size")
        return count_setting(self.processor, size.get("height"), "height of size", most=MOST_SIDE)

    @property
    def least_token_count(self) -> int:
        """No picture has fewer visual tokens: those of one tile."""
        return self.grid[0] * self.grid[1]

    @property
    def token_count(self) -> int:
        """Most visual tokens of a picture."""
        most = int(self.processor.max_patches)
        return (most + 1 if self.crops and most > 1 else 1) * self.least_token_count

    def __call__(self, image: PIL.Image.Image) -> EncodedImage:
        """Turn one RGB picture into model input.

        Returns:
            ``pixel_values`` f4 ``[tiles, 3, H, W]``, a thumbnail last if there are several, and their tiles.
        """
        output = prepare_picture(self.processor, image, crop_to_patches=self.crops)
        pixels = tile_array(output["pixel_values"], side=self.side)
        cols, rows = self._arrangement(image)
        parts = tiled(rows, cols, self.grid)
        tiles = parts if len(parts) == 1 else (*parts, whole(self.grid))
        tokens = self.image_token * (self.least_token_count * len(tiles))
        return EncodedImage(inputs={"pixel_values": pixels}, tiles=tiles, text=f"{self.before}{tokens}{self.after}")

    def video(self, frames: Sequence[Frame]) -> EncodedImage:
        """Turn the frames of one video into model input: ``pixel_values`` f4 ``[F, 3, H, W]``, a tile a frame, and the text."""
        if self.frames is None:
            raise unread_videos(self)
        pixels, tiles = self.frames(frames)
        shown = f"{self.before}{self.image_token * self.least_token_count}{self.after}"
        text = "\n".join(f"Frame{number}: {shown}" for number in range(1, len(frames) + 1))
        return EncodedImage(inputs={"pixel_values": pixels}, tiles=tiles, text=text)

    def _arrangement(self, image: PIL.Image.Image) -> tuple[int, int]:
        """Columns and rows of tiles."""
        fewest, most = int(self.processor.min_patches), int(self.processor.max_patches)
        if not self.crops or most <= 1:
            return 1, 1
        cols, rows = get_optimal_tiled_canvas((image.height, image.width), (self.side, self.side), fewest, most)
        return cols, rows

"""Idefics 3 and SmolVLM: rows and columns of tiles with text between them, then the whole picture.

The picture is stretched to whole tiles, so there is no padding. Each tile is written
``<fake_token_around_image><row_1_col_2>`` and its image tokens, each row of tiles ends with a line feed, and the
whole picture follows as ``<global-img>``. SmolVLM reads each frame of a video as the whole picture alone, with its time in
front; Idefics 3 knows no videos.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from typing import ClassVar

import numpy as np
import PIL.Image
from transformers.image_utils import SizeDict

from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.images.encoder import EncodedImage, check_settings, plain_size, prepare_picture
from vlm_distill_cache.data.images.layouts.pixels import (
    MOST_SIDE,
    Layout,
    check_processor,
    count_setting,
    covered_share,
    tile_array,
    tiled,
    whole,
)
from vlm_distill_cache.data.images.layouts.videos import SquaredFrames, frame_tiles, in_words, unread_videos
from vlm_distill_cache.data.sample import Frame

AROUND, GLOBAL = "<fake_token_around_image>", "<global-img>"


@dataclass(frozen=True, kw_only=True)
class SplitEncoder(Layout):
    """`Idefics3ImageProcessorPil` or `SmolVLMImageProcessorPil` with its geometry and prompt text.

    Attributes:
        grid: Rows and columns of one tile's visual tokens, after the pixel shuffle.
        patch_size: Pixels per side of a patch of the vision tower.
        image_token: The text of one visual token.
        frames: How frames of a video are read; None: as so many pictures.
    """

    grid: tuple[int, int]
    patch_size: int
    image_token: str = "<image>"
    frames: SquaredFrames | None = None

    kind: ClassVar[str] = "split"
    keys: ClassVar[tuple[str, ...]] = ("max_image_size", "do_image_splitting")
    writes_text: ClassVar[bool] = True
    written_video: ClassVar[str | None] = "<video>"

    def __post_init__(self) -> None:
        check_processor(self.processor, "max_image_size", "do_image_splitting")
        if min(self.grid) < 1 or not 1 <= self.patch_size <= self.side:
            raise ConfigError(
                f"a tile of {self.side} pixels needs at least 1 x 1 visual tokens and patches of 1..{self.side} "
                f"pixels, got grid={self.grid}, patch_size={self.patch_size}"
            )
        check_settings(self)

    @property
    def side(self) -> int:
        """Pixels per side of a tile."""
        stored = self.processor.max_image_size
        edge = dict(stored).get("longest_edge") if isinstance(stored, Mapping | SizeDict) else None
        return count_setting(self.processor, edge, "longest_edge of max_image_size", most=MOST_SIDE)

    @property
    def least_token_count(self) -> int:
        """No picture has fewer visual tokens: those of one tile."""
        return self.grid[0] * self.grid[1]

    @property
    def token_count(self) -> int:
        """Most visual tokens of a picture: a square one's, or of the one shape that all are scaled to."""
        size = plain_size(self.processor, self.processor.size, "size")
        if self.processor.do_resize and "longest_edge" in size:
            tiles, _, _ = self.processor.get_number_of_image_patches(self.side, self.side)
            return max(int(tiles), 1) * self.least_token_count
        if not self.processor.do_image_splitting:
            return self.least_token_count
        # Of pictures that keep their size the library takes those of 4096 pixels for the largest there are.
        shape = (size["height"], size["width"]) if self.processor.do_resize else (4096, 4096)
        rows, cols = (ceil(edge / self.side) for edge in shape)
        return (rows * cols + 1 if rows * cols > 1 else 1) * self.least_token_count

    def __call__(self, image: PIL.Image.Image) -> EncodedImage:
        """Turn one RGB picture into model input.

        Returns:
            ``pixel_values`` f4 ``[tiles, 3, H, W]``, the whole picture last, and their tiles. Tiles have one size,
            so the processor's mask of their pixels is all ones, which is what the model assumes without one.

        Raises:
            SampleError: A tile's values are all exactly 0: the model takes it for padding and drops its tokens.
        """
        output = prepare_picture(self.processor, image, return_row_col_info=True)
        pixels = tile_array(output["pixel_values"][0], side=self.side)
        _refuse_empty(pixels)
        rows, cols = int(output["rows"][0][0]), int(output["cols"][0][0])
        share = covered_share(self.side, self.patch_size)
        tiles = (*tiled(rows, cols, self.grid, share), whole(self.grid, share))
        return EncodedImage(inputs={"pixel_values": pixels}, tiles=tiles, text=self._text(rows, cols))

    def video(self, frames: Sequence[Frame]) -> EncodedImage:
        """Turn the frames of one video into model input: ``pixel_values`` f4 ``[F, 3, H, W]``, a tile a frame, and the text.

        The text says how many frames there are and when each is; how long the video is, by its last frame.

        Raises:
            SampleError: As for a picture.
        """
        if self.frames is None:
            raise unread_videos(self)
        pixels = self.frames(frames, side=self.side)
        _refuse_empty(pixels)
        text = (
            f"You are provided the following series of {in_words(len(frames))} frames from a "
            f"{timedelta(seconds=int(frames[-1].time))} [H:MM:SS] video.\n"
        )
        for frame in frames:
            minutes, seconds = divmod(int(frame.time), 60)
            text += f"\nFrame from {minutes:02d}:{seconds:02d}:{self._text(0, 0)}"
        tiles = frame_tiles(len(frames), self.grid, covered_share(self.side, self.patch_size))
        return EncodedImage(inputs={"pixel_values": pixels}, tiles=tiles, text=f"{text}\n\n")

    def _text(self, rows: int, cols: int) -> str:
        tokens = self.image_token * self.least_token_count
        text = ""
        for row in range(1, rows + 1):
            text += "".join(f"{AROUND}<row_{row}_col_{col}>{tokens}" for col in range(1, cols + 1)) + "\n"
        text += "\n" if rows else ""
        return f"{text}{AROUND}{GLOBAL}{tokens}{AROUND}"


def _refuse_empty(pixels: np.ndarray) -> None:
    """Refuse tiles f4 ``[tiles, 3, H, W]`` of which one is all zeros: the model takes it for padding."""
    if not np.any(pixels, axis=(1, 2, 3)).all():
        raise SampleError(
            "a part of the picture is exactly the colour that the image processor maps to 0, which the model "
            "reads as no picture at all; change its image_mean, or leave the sample out"
        )

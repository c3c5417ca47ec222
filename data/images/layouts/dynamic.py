"""Qwen2-VL, 2.5 and 3: the picture at about its own size, one visual token per square of merged patches.

The sides are rounded to whole tokens, so there is no padding, and the number of tokens follows the picture. The
chat template writes the tags around the picture; only the image token itself is opened out. Frames of a video are read in
twos: one token shows a square of both (`PatchedFrames`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import PIL.Image

from vlm_distill_cache.common.attention.tiles import grid_tile
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.images.encoder import EncodedImage, check_settings, plain_size, prepare_picture
from vlm_distill_cache.data.images.layouts.pixels import MOST_SIDE, Layout, check_processor, count_setting
from vlm_distill_cache.data.images.layouts.videos import MOST_ELONGATED, PatchedFrames, unread_videos
from vlm_distill_cache.data.sample import Frame


@dataclass(frozen=True, kw_only=True)
class DynamicEncoder(Layout):
    """`Qwen2VLImageProcessorPil` with its geometry.

    The processor's ``size`` holds the fewest and most pixels as ``shortest_edge`` and ``longest_edge``.

    Attributes:
        frames: How frames of a video are read; None: videos are not.
    """

    frames: PatchedFrames | None = None

    kind: ClassVar[str] = "dynamic"
    keys: ClassVar[tuple[str, ...]] = ("patch_size", "temporal_patch_size", "merge_size")

    def __post_init__(self) -> None:
        check_processor(self.processor, *self.keys)
        for name in self.keys:
            count_setting(self.processor, getattr(self.processor, name), name, most=MOST_SIDE)
        _ = self._pixels
        if self.processor.do_resize is not True:
            raise ConfigError(
                "preprocessor_config.json: a Qwen image processor must scale pictures to whole tokens: set do_resize to true"
            )
        check_settings(self)

    @property
    def least_token_count(self) -> int:
        """No picture has fewer visual tokens."""
        return max(1, min(self._pixels) // self._token_pixels)

    @property
    def token_count(self) -> int:
        """Most visual tokens of a picture."""
        return max(1, max(self._pixels) // self._token_pixels)

    def __call__(self, image: PIL.Image.Image) -> EncodedImage:
        """Turn one RGB picture into model input.

        Returns:
            ``pixel_values`` f4 ``[patches, D]``, ``image_grid_thw`` i8 ``[1, 3]`` (time, rows and columns of
            patches), and one tile.

        Raises:
            SampleError: The sides differ more than the processor takes.
        """
        short, long = sorted(image.size)
        if long > MOST_ELONGATED * short:
            raise SampleError(
                f"an image of {image.width} x {image.height} pixels is more than {MOST_ELONGATED} times as long as "
                "it is wide, which this family's image processor refuses; crop it first"
            )
        output = prepare_picture(self.processor, image)
        shape = np.asarray(output["image_grid_thw"], dtype=np.int64).reshape(1, 3)
        merge = int(self.processor.merge_size)
        tile = grid_tile(int(shape[0, 1]) // merge, int(shape[0, 2]) // merge)
        pixels = np.ascontiguousarray(output["pixel_values"], dtype=np.float32)
        return EncodedImage(inputs={"pixel_values": pixels, "image_grid_thw": shape}, tiles=(tile,))

    def video(self, frames: Sequence[Frame]) -> EncodedImage:
        """Turn the frames of one video into model input, as `PatchedFrames`; raises as that does, or `unread_videos`."""
        if self.frames is None:
            raise unread_videos(self)
        return self.frames(frames)

    @property
    def _pixels(self) -> tuple[int, int]:
        """Fewest and most pixels of a picture; of those that are above the most, fewer may be left than the fewest."""
        size = plain_size(self.processor, self.processor.size, "size")
        fewest = count_setting(self.processor, size.get("shortest_edge"), "shortest_edge of size (the fewest pixels)")
        most = count_setting(
            self.processor, size.get("longest_edge"), "longest_edge of size (the most pixels)", most=2**40
        )
        return fewest, most

    @property
    def _token_pixels(self) -> int:
        return (int(self.processor.patch_size) * int(self.processor.merge_size)) ** 2

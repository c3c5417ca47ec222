"""What a picture in memory is to our models: RGB, and for some of them a square. Goes with each student's weights."""

from collections.abc import Sequence

import numpy as np
import PIL.Image

MAX_PIXELS = 89_478_485  # Pillow's own limit for a likely decompression bomb: 256 MiB of RGB


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert any Pillow mode to RGB: alpha over white, 16 bit scaled to 8 rather than clipped.

    Pillow's own ``convert`` clips 16-bit greys at 255 (an all-white picture) and drops alpha, which
    uncovers whatever colour lay under transparent pixels.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # I;16, I;16B, I: 16-bit PNG, TIFF and PGM
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        transparent = image.info.get("transparency")  # a grey that stands for nothing, which is shown as white
        if isinstance(transparent, int):
            wide[wide == transparent] = 65535
        return PIL.Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        scale = 255.0 if float(values.max()) <= 1.0 else 1.0  # floats come as [0, 1] or as [0, 255]
        return PIL.Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = PIL.Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def paste_on_square(image: PIL.Image.Image, side: int, mean: Sequence[float] | float | None) -> PIL.Image.Image:
    """LLaVA's expand2square: centred on the mean colour, the odd pixel at the far side.

    Args:
        image: RGB, of at most ``side`` pixels a side.
        side: Of the square.
        mean: Of each channel in [0, 1], or one of all; None: black.
    """
    mean = mean or 0.0
    channels = (mean,) * 3 if isinstance(mean, int | float) else mean
    # int(), not round(): expand2square truncates, and one grey level is visible in a hash.
    square = PIL.Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in channels))
    square.paste(image, ((side - image.size[0]) // 2, (side - image.size[1]) // 2))
    return square

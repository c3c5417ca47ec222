"""Decoded frames of FFmpeg as RGB pictures, the same on every machine.

FFmpeg's own conversion rounds otherwise on other processors and in other versions, and one grey level is visible in an
image's hash: a cache built here could not be read there. So what videos are made of (planes of luma and chroma) is
converted here, in integers.
"""

import re
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from vlm_distill_cache.common.pixels.rgb import to_rgb

_PLANAR = re.compile(r"(?:yuv(?P<full>j?)a?(?P<cut>4\d\d)p|gray)(?P<bits>\d*)(?:le|be)?")
# The same values in another order, as planes.
_AS_PLANES = {
    "nv12": "yuv420p", "nv21": "yuv420p", "nv16": "yuv422p", "nv24": "yuv444p", "nv42": "yuv444p",
    "yuyv422": "yuv422p", "uyvy422": "yuv422p", "yvyu422": "yuv422p", "uyyvyy411": "yuv411p",
    "p010le": "yuv420p10le", "p010be": "yuv420p10be", "p016le": "yuv420p16le", "p016be": "yuv420p16be",
}  # fmt: skip
_CUTS = {"444": (1, 1), "440": (2, 1), "422": (1, 2), "420": (2, 2), "411": (1, 4), "410": (4, 4)}  # rows, columns
_LIMITED, _FULL = 1, 2  # FFmpeg's color_range
# Weights of red and blue in luma by FFmpeg's colorspace (ITU-T H.273, table 4); BT.601 where the file says nothing.
_WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
_BT601 = (0.299, 0.114)
_POINT = 20  # binary digits behind the point
_STRIP = (
    65536  # pixels at once: what is computed of them fits into a processor's cache, three times as fast as all at once
)


def frame_to_rgb(frame: Any) -> PIL.Image.Image:
    """Convert a decoded ``av.VideoFrame`` of any pixel format to RGB, as it is stored; alpha over white.

    Luma and chroma go by the matrix and range that the file states; without, BT.601 and the limited range (grey: the
    full). Chroma is repeated, not interpolated. Fields of interlaced video stay woven; HDR is not mapped.
    """
    name, matrix, levels = frame.format.name, int(frame.colorspace), int(frame.color_range)
    if name in _AS_PLANES:
        name = _AS_PLANES[name]
        frame = frame.reformat(format=name)
    kind = _PLANAR.fullmatch(name)
    if kind is None:
        clear = any(component.is_alpha for component in frame.format.components)
        frame = frame.reformat(format="rgba" if clear else "rgb24")
        pixels = _plane(frame, 0, frame.height, frame.width * (4 if clear else 3), "u1")
        shape = (frame.height, frame.width, -1)
        return to_rgb(PIL.Image.fromarray(np.ascontiguousarray(pixels).reshape(shape)))
    bits = int(kind["bits"] or 8)
    dtype = "u1" if bits == 8 else (">u2" if name.endswith("be") else "<u2")
    full = levels == _FULL or bool(kind["full"]) or (kind["cut"] is None and levels != _LIMITED)
    height, width = frame.height, frame.width
    chroma = None
    if kind["cut"] is not None:
        down, across = _CUTS[kind["cut"]]
        size = (-(-height // down), -(-width // across))
        chroma = (_plane(frame, 1, *size, dtype), _plane(frame, 2, *size, dtype), down, across)
    weights = _WEIGHTS.get(matrix, _BT601)
    picture = PIL.Image.fromarray(luma_to_rgb(_plane(frame, 0, height, width, dtype), chroma, bits, full, weights))
    if "a4" in name:
        alpha = _plane(frame, 3, height, width, dtype) >> (bits - 8)
        picture.putalpha(PIL.Image.fromarray(alpha.astype(np.uint8)))
    return to_rgb(picture)


def luma_to_rgb(
    luma: NDArray[Any],
    chroma: tuple[NDArray[Any], NDArray[Any], int, int] | None,
    bits: int,
    full: bool,
    weights: tuple[float, float],
) -> NDArray[np.uint8]:
    """Convert luma and chroma to RGB in integers.

    Args:
        luma: u1 or u2 ``[H, W]``.
        chroma: Blue and red difference, as `luma` ``[ceil(H / down), ceil(W / across)]``, with ``down`` and ``across``;
            None: grey.
        bits: Of each value, 8 to 16.
        full: Values take the full range, not the limited one (8 bits: luma 16 to 235, chroma 16 to 240).
        weights: Of red and blue in luma.

    Returns:
        u1 ``[H, W, 3]``, within one level of the real-valued formula.

    Source:
        ITU-T H.273, section 8.3.
    """
    one = 1 << _POINT
    unit = 1 << (bits - 8)
    black, luma_span, chroma_span = (0, 2**bits - 1, 2**bits - 1) if full else (16 * unit, 219 * unit, 224 * unit)
    height, width = luma.shape
    rgb = np.empty((height, width, 3), np.uint8)
    from_red, from_blue = (2 * (1 - weight) * 255 * one / chroma_span for weight in weights)
    green = 1 - sum(weights)
    down, across = chroma[2:] if chroma is not None else (1, 1)
    rows = max(1, _STRIP // (width * down)) * down
    for top in range(0, height, rows):
        light = (luma[top : top + rows].astype(np.int32) - black) * round(255 * one / luma_span) + one // 2
        if chroma is None:
            rgb[top : top + rows] = (light >> _POINT).clip(0, 255)[..., None]
            continue
        blue, red = (plane[top // down : (top + rows) // down].astype(np.int32) - 128 * unit for plane in chroma[:2])
        shares = (
            red * round(from_red),
            red * -round(from_red * weights[0] / green) - blue * round(from_blue * weights[1] / green),
            blue * round(from_blue),
        )
        for channel, share in enumerate(shares):
            whole = share.repeat(down, axis=0)[: len(light)].repeat(across, axis=1)[:, :width]
            whole += light
            whole >>= _POINT
            rgb[top : top + rows, :, channel] = whole.clip(0, 255, out=whole)
    return rgb


def _plane(frame: Any, number: int, height: int, width: int, dtype: str) -> NDArray[Any]:
    """Values of a plane ``[height, width]`` without what pads its lines."""
    plane = frame.planes[number]
    values = np.frombuffer(plane, dtype)
    return values.reshape(-1, plane.line_size // values.itemsize)[:height, :width]

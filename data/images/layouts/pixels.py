"""What all layouts share: running the library's processor, and reading what decides its pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from vlm_distill_cache.common.attention.tiles import FINEST_SIDE, Tile
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.common.pixels.rgb import MAX_PIXELS
from vlm_distill_cache.data.images.encoder import PIXEL_KEYS, plain_setting, unusable_settings, whole_number

MOST_SIDE = 8192
"""Pixels per side of a tile, at most: its square is a likely picture."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A PIL image processor of the library, with what the model adds to its geometry as further attributes.

    Attributes:
        videos_unread: Why videos cannot be read, of a family that has a way of its own to read them; no part of a plan.
        frames: How frames of a video are read; None: they are not, or as so many pictures.
        kind: Names the layout in a plan.
        keys: Settings of the processor's class that decide pixels, beside those that all processors have.

    Raises:
        ConfigError: The processor is of another kind than the layout's, or its settings or the grid do not fit.
    """

    processor: Any
    videos_unread: str = ""
    frames: Any = None

    kind: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    marker: ClassVar[str | None] = None
    written_video: ClassVar[str | None] = None  # `video_marker` of a family that reads videos
    writes_text: ClassVar[bool] = False

    def attention_grid(self) -> tuple[int, int]:
        """Rows and columns that stage one pools attention to: a picture's tokens form no one grid."""
        return FINEST_SIDE, FINEST_SIDE

    @property
    def video_marker(self) -> str | None:
        """What a prompt template writes for a video; None: the token at the visual positions of one."""
        return self.written_video if self.frames is not None or self.videos_unread else None

    def video_dict(self) -> dict[str, Any]:
        """What decides pixels, boxes and text of a video, as plain JSON; empty: frames are pictures."""
        return {} if self.frames is None else dict(self.frames.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """What decides pixels, boxes and the text, as plain JSON."""
        apart = ("processor", "frames", "videos_unread")
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in apart}
        stored = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        return {"kind": self.kind, **stored, "processor": pixel_settings(self.processor, self.keys)}


def pixel_settings(processor: Any, keys: Sequence[str]) -> dict[str, Any]:
    """What decides a processor's pixels, as plain JSON: the settings that all have, and those of its class."""
    stored = processor.to_dict()
    return {key: plain_setting(stored.get(key)) for key in (*PIXEL_KEYS, *keys)}


def check_processor(processor: Any, *needed: str) -> None:
    """Refuse a processor of another class than the layout's: one that lacks some of its settings; raises ConfigError."""
    missing = [name for name in needed if getattr(processor, name, None) is None]
    if missing:
        raise ConfigError(
            f"image processor {type(processor).__name__} has no {', '.join(missing)}, which this layout needs; "
            "use the one that the checkpoint's preprocessor_config.json names"
        )


def count_setting(processor: Any, value: Any, name: str, *, most: int = MAX_PIXELS) -> int:
    """A setting that counts pixels, patches or tiles.

    Raises:
        ConfigError: If it is missing, or no whole number from 1 to ``most``.
    """
    try:
        count = whole_number(value)
    except ValueError as error:
        raise unusable_settings(processor, f"{name}: {error}") from error
    if count > most:
        raise unusable_settings(processor, f"{name}: expected at most {most}, got {count}")
    return count


def tile_array(values: Any, *, side: int) -> np.ndarray:
    """Pixels of one picture's tiles, given as arrays ``[3, H, W]``, as one array float32 ``[tiles, 3, H, W]``.

    Raises:
        SampleError: If tiles are not of the height and width that the layout expects.
    """
    pixels = np.ascontiguousarray(values, dtype=np.float32)
    if pixels.shape[1:] != (3, side, side):
        raise SampleError(
            f"the image processor gave tiles of shape {list(pixels.shape[1:])}, expected [3, {side}, {side}] from "
            "its settings; size and crop_size (or max_image_size) must agree"
        )
    return pixels


def covered_share(side: int, patch_size: int) -> float:
    """Share of a tile's side that whole patches cover (SigLIP: 27 x 14 = 378 of 384 pixels)."""
    return side // patch_size * patch_size / side


def covered_tile(grid: tuple[int, int], region: tuple[float, float, float, float], share: float = 1.0) -> Tile:
    """Tokens over the part of a region that patches cover, from its upper left corner."""
    x0, y0, x1, y1 = region
    return Tile(rows=grid[0], cols=grid[1], region=(x0, y0, x0 + (x1 - x0) * share, y0 + (y1 - y0) * share))


def tiled(rows: int, cols: int, grid: tuple[int, int], share: float = 1.0) -> tuple[Tile, ...]:
    """A picture cut into rows x cols equal tiles of ``grid`` tokens each, row by row."""
    return tuple(
        covered_tile(grid, (col / cols, row / rows, (col + 1) / cols, (row + 1) / rows), share)
        for row in range(rows)
        for col in range(cols)
    )


def whole(grid: tuple[int, int], share: float = 1.0) -> Tile:
    """One tile that shows the whole picture, squashed."""
    return covered_tile(grid, (0.0, 0.0, 1.0, 1.0), share)

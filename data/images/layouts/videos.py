"""How frames of a video become visual tokens, for the families whose library processor takes videos.

| class | families | frames | visual tokens |
|---|---|---|---|
| `FixedFrames` | LLaVA-OneVision, LLaVA-NeXT-Video, InternVL | one fixed size, squashed or cropped | one grid a frame |
| `SquaredFrames` | SmolVLM | one fixed size, squashed | one grid a frame, its time in front |
| `PatchedFrames` | Qwen2-VL, 2.5, 3 | rounded to whole tokens, all alike | one grid for two frames |

All other families read frames as so many pictures. The library's own video processors scale tensors by torchvision, whose
colours differ from Pillow's by a few of 255 levels; here frames are prepared as pictures are, by the library's PIL
processors, so that pixels are the same on every machine. The frames are those that were sampled: none is left out here.

Dims: F frames, T temporal patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, sqrt
from typing import Any, Literal

import numpy as np
from transformers import CLIPImageProcessorPil

from vlm_distill_cache.common.attention.tiles import Tile, View, grid_tile
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.common.pixels.rgb import MAX_PIXELS
from vlm_distill_cache.data.images.encoder import (
    PIXEL_KEYS,
    EncodedImage,
    ImageEncoder,
    plain_setting,
    plain_size,
    prepare_picture,
)
from vlm_distill_cache.data.images.layouts.pixels import Layout, count_setting, pixel_settings, tile_array, whole
from vlm_distill_cache.data.sample import Frame

BESIDE = (1.0, 0.0, 2.0, 1.0)
"""A region beyond the picture's right edge."""

MOST_ELONGATED = 200
"""Long over short side that the library's processors of Qwen-VL still take."""

Times = Literal["", "interval", "text"]


@dataclass(frozen=True, kw_only=True)
class FixedFrames:
    """Frames of one fixed size, one grid of tokens each.

    Attributes:
        images: Pixels and boxes of a frame.
        newline: One learnt token without a picture ends the video (LLaVA-OneVision). It belongs to the last frame's view.
    """

    images: ImageEncoder
    newline: bool = False

    @staticmethod
    def plain_processor(processor: Any, settings: Mapping[str, Any]) -> Any:
        """The library's plain PIL processor (scale, crop, normalise) with the settings of videos; without any, of pictures."""
        stored = settings or processor.to_dict()
        chosen = {key: plain_setting(stored[key]) for key in PIXEL_KEYS if stored.get(key) is not None}
        return CLIPImageProcessorPil(**chosen | {"do_center_crop": bool(stored.get("do_center_crop"))})

    def to_dict(self) -> dict[str, Any]:
        """What decides pixels and boxes, as plain JSON."""
        return {"newline": self.newline, **self.images.to_dict()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], processor: Any) -> "FixedFrames":
        """Inverse of `to_dict`."""
        rows, cols = stored["grid"]
        images = ImageEncoder(
            processor=cls.plain_processor(processor, stored["processor"]),
            layout=stored["layout"],
            grid=(int(rows), int(cols)),
            patch_size=stored["patch_size"],
        )
        return cls(images=images, newline=bool(stored["newline"]))

    def __call__(self, frames: Sequence[Frame]) -> tuple[np.ndarray, tuple[Tile, ...]]:
        """Pixels f4 ``[F, 3, H, W]`` and tiles of a video's frames."""
        made = [self.images(frame.image) for frame in frames]
        tiles = [
            replace(tile, span=(float(at), at + 1.0), is_frame=True)
            for at, one in enumerate(made)
            for tile in one.tiles
        ]
        if self.newline:
            tiles.append(Tile(rows=1, cols=1, region=BESIDE, span=tiles[-1].span, is_frame=True))
        return np.concatenate([one.inputs["pixel_values"] for one in made]), tuple(tiles)


@dataclass(frozen=True, kw_only=True)
class SquaredFrames:
    """Frames scaled by their long edge, then squashed to one tile, and never cut (SmolVLM).

    Attributes:
        processor: `SmolVLMImageProcessorPil` with the settings of videos.
    """

    processor: Any

    @classmethod
    def of(cls, processor: Any, settings: Mapping[str, Any]) -> "SquaredFrames":
        """With the settings of videos, what they leave out being as for pictures."""
        sampling = settings.get("video_sampling")
        sized = {"size": sampling["video_size"]} if isinstance(sampling, Mapping) and sampling.get("video_size") else {}
        keys = (*PIXEL_KEYS, "max_image_size")
        chosen = processor.to_dict() | {key: settings[key] for key in keys if settings.get(key) is not None} | sized
        kept = {key: plain_setting(chosen[key]) for key in keys if chosen.get(key) is not None}
        return cls(processor=type(processor)(**kept, do_image_splitting=False))

    def to_dict(self) -> dict[str, Any]:
        """What decides pixels, as plain JSON."""
        return {"processor": pixel_settings(self.processor, ("max_image_size",))}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], processor: Any) -> "SquaredFrames":
        """Inverse of `to_dict`."""
        return cls.of(processor, stored["processor"])

    def __call__(self, frames: Sequence[Frame], *, side: int) -> np.ndarray:
        """Pixels f4 ``[F, 3, side, side]`` of a video's frames."""
        made = [
            prepare_picture(self.processor, frame.image, do_image_splitting=False)["pixel_values"][0]
            for frame in frames
        ]
        return tile_array(np.concatenate(made), side=side)


@dataclass(frozen=True, kw_only=True)
class PatchedFrames:
    """Frames cut into patches that are some frames deep (Qwen-VL: 2); the last frame fills the last patch up.

    Attributes:
        processor: `Qwen2VLImageProcessorPil` with the settings of videos. Its ``size`` bounds the pixels of a frame; with
            times as text (Qwen3-VL) those of all frames together.
        times: How the model is told when a patch is: not at all (Qwen2-VL), by the seconds from one to the next
            (``interval``: Qwen2.5-VL), or by ``text`` in front of each (Qwen3-VL).
        most_tokens: The ``max_video_tokens`` of a processor that bounds pixels by the number of frames
            (``cap_pixels_per_frame``); None: it does not.
        video_token: The text of one visual token; with times as text, so are the next two.
        before: In front of each temporal patch.
        after: Behind it.
    """

    processor: Any
    times: Times = ""
    most_tokens: int | None = None
    video_token: str = "<|video_pad|>"
    before: str = "<|vision_start|>"
    after: str = "<|vision_end|>"

    @classmethod
    def of(cls, processor: Any, settings: Mapping[str, Any], **options: Any) -> "PatchedFrames":
        """With the settings of videos; what they leave out is as for pictures.

        Raises:
            ConfigError: A setting is no number.
        """
        patches = ("patch_size", "temporal_patch_size", "merge_size")
        bounds = {"shortest_edge": settings.get("min_pixels"), "longest_edge": settings.get("max_pixels")}
        chosen = processor.to_dict() | {name: value for name, value in settings.items() if value is not None}
        size = dict(chosen["size"]) | {name: value for name, value in bounds.items() if value is not None}
        kept = {key: plain_setting(chosen[key]) for key in PIXEL_KEYS if chosen.get(key) is not None}
        own = {key: count_setting(processor, chosen[key], key) for key in patches}
        sized = {"size": plain_size(processor, size, "size")}
        most = settings.get("max_video_tokens") if settings.get("cap_pixels_per_frame") else None
        if most is not None:
            options["most_tokens"] = count_setting(processor, most, "max_video_tokens")
        return cls(processor=type(processor)(**kept | own | sized), **options)

    def to_dict(self) -> dict[str, Any]:
        """What decides pixels, boxes and text, as plain JSON."""
        texts = {name: getattr(self, name) for name in ("times", "most_tokens", "video_token", "before", "after")}
        keys = ("patch_size", "temporal_patch_size", "merge_size")
        return {**texts, "processor": pixel_settings(self.processor, keys)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], processor: Any) -> "PatchedFrames":
        """Inverse of `to_dict`."""
        own = {name: stored[name] for name in ("times", "most_tokens", "video_token", "before", "after")}
        return cls.of(processor, stored["processor"], **own)

    def __call__(self, frames: Sequence[Frame]) -> EncodedImage:
        """Turn the frames of one video into model input.

        Returns:
            ``pixel_values_videos`` f4 ``[patches, D]``, ``video_grid_thw`` i8 ``[1, 3]`` (temporal patches, rows and columns
            of patches), with intervals ``second_per_grid_ts`` f4 ``[1]``; and T tiles.

        Raises:
            SampleError: The frames differ in size, or their sides more than the processor takes.
        """
        sizes = {frame.image.size for frame in frames}
        (width, height) = frames[0].image.size
        if len(sizes) > 1:
            raise SampleError(f"its frames differ in size ({sorted(sizes)[:3]} pixels); scale them to one size first")
        if max(width, height) > MOST_ELONGATED * min(width, height):
            raise SampleError(
                f"frames of {width} x {height} pixels are more than {MOST_ELONGATED} times as long as they are wide, which "
                "this family's processor refuses; crop them first"
            )
        deep, merge = int(self.processor.temporal_patch_size), int(self.processor.merge_size)
        patches, rows, cols = self._patches(frames)  # [F, rows * cols, C, P * P]
        filled = np.concatenate([patches, *[patches[-1:]] * (-len(frames) % deep)])
        count = len(filled) // deep
        joined = filled.reshape(count, deep, *patches.shape[1:]).transpose(
            0, 2, 3, 1, 4
        )  # [T, rows * cols, C, deep, P * P]
        inputs: dict[str, np.ndarray] = {
            "pixel_values_videos": np.ascontiguousarray(joined.reshape(count * rows * cols, -1), dtype=np.float32),
            "video_grid_thw": np.array([[count, rows, cols]], dtype=np.int64),
        }
        if self.times == "interval":
            inputs["second_per_grid_ts"] = np.array([deep * seconds_per_frame(frames)], dtype=np.float32)
        spans = [(float(at), float(min(at + deep, len(frames)))) for at in range(0, len(frames), deep)]
        tiles = tuple(grid_tile(rows // merge, cols // merge, View(span, is_frame=True)) for span in spans)
        text = None
        if self.times == "text":
            tokens = self.video_token * tiles[0].token_count
            at = [(frames[int(first)].time + frames[int(end) - 1].time) / 2 for first, end in spans]
            text = "".join(f"<{time:.1f} seconds>{self.before}{tokens}{self.after}" for time in at)
        return EncodedImage(inputs=inputs, tiles=tiles, text=text)

    def _patches(self, frames: Sequence[Frame]) -> tuple[np.ndarray, int, int]:
        """Each frame's patches by themselves, f4 ``[F, patches, C, P * P]``, and their rows and columns."""
        width, height = frames[0].image.size
        high, wide = self._sides(height, width, len(frames))
        if len(frames) * high * wide > MAX_PIXELS:
            raise SampleError(
                f"{len(frames)} frames of {wide} x {high} pixels are more than the {MAX_PIXELS} pixels allowed; read fewer "
                "(frames.most), or lower longest_edge of size in video_preprocessor_config.json"
            )
        made, deep = [], int(self.processor.temporal_patch_size)
        for frame in frames:
            scaled = frame.image.resize((wide, high), self.processor.resample)
            found = np.asarray(prepare_picture(self.processor, scaled, do_resize=False)["pixel_values"])
            made.append(found.reshape(len(found), 3, deep, -1)[:, :, 0])
        patch = int(self.processor.patch_size)
        return np.stack(made), high // patch, wide // patch

    def _sides(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """Pixels that frames are scaled to: multiples of a token's side, within the bounds of ``size``.

        Source:
            Qwen2-VL (arXiv:2409.12191), section 2.1, naive dynamic resolution; Qwen3-VL bounds all frames together.
        """
        size, deep = dict(self.processor.size), int(self.processor.temporal_patch_size)
        token = int(self.processor.patch_size) * int(self.processor.merge_size)
        fewest, most = int(size["shortest_edge"]), int(size["longest_edge"])
        joint = self.times == "text"
        count = max(frames, deep) if joint else 1
        if self.most_tokens is not None:
            share = most // frames if joint else int(self.most_tokens * token**2 * 0.9) * deep // frames
            most = max(min(self.most_tokens * token**2 if joint else most, share), int(fewest * 1.05)) * count
        if joint and min(height, width) < token:
            scale = max(token / height, token / width)
            height, width = int(height * scale), int(width * scale)
        high, wide = (round(side / token) * token for side in (height, width))
        pixels = (round(count / deep) * deep if joint else 1) * high * wide
        if pixels > most:
            shrink = sqrt(count * height * width / most)
            high, wide = (max(token, floor(side / shrink / token) * token) for side in (height, width))
        elif pixels < fewest:
            grow = sqrt(fewest / (count * height * width))
            high, wide = (ceil(side * grow / token) * token for side in (height, width))
        return high, wide


def unread_videos(encoder: Layout) -> ConfigError:
    """The error about an encoder that was opened or described without settings of videos."""
    why = encoder.videos_unread or "its plan was made for data without videos"
    return ConfigError(
        f"how this model reads videos is not known: {why}; open a checkpoint that holds the files of its processor"
    )


def stacks_videos(encoder: Any) -> bool:
    """Whether an image encoder is of a model that takes videos of equally many frames alone in one pass."""
    return bool(getattr(getattr(encoder, "frames", None), "newline", False))


def seconds_per_frame(frames: Sequence[Frame]) -> float:
    """Mean seconds from a frame to the next; 1 where there is one frame alone."""
    return (frames[-1].time - frames[0].time) / (len(frames) - 1) if len(frames) > 1 else 1.0


def frame_tiles(count: int, grid: tuple[int, int], share: float = 1.0) -> tuple[Tile, ...]:
    """One tile a frame that shows it whole, squashed."""
    return tuple(replace(whole(grid, share), span=(float(at), at + 1.0), is_frame=True) for at in range(count))


_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """A number from 0 to 999 in English words, as SmolVLM's processor writes how many frames there are; else in digits."""
    if not 0 <= number < 1000:
        return str(number)
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")

"""How each family reads a video: from configuration, tokenizer and the settings of its video processor to frames.

Families that are not here read the frames as so many pictures.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import PIL.Image

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.data.families.images import (
    image_size_of,
    patch_size_of,
    patches_of,
    side_of,
    token_of,
    uneven_patch_of,
)
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.images.layouts.videos import FixedFrames, PatchedFrames, SquaredFrames
from vlm_distill_cache.data.text.processors import load_video_settings

Frames = FixedFrames | PatchedFrames | SquaredFrames
MakesFrames = Callable[[Any, Any, Any, Mapping[str, Any]], Frames]
"""From image encoder, configuration, tokenizer and the settings of videos."""


def with_videos(encoder: Any, config: Any, tokenizer: Any, folder: Path, makes: MakesFrames) -> Any:
    """An image encoder that reads videos, too, as the files of a folder say.

    Where they do not, it reads pictures as before and says why when it is given a video.
    """
    try:
        return replace(encoder, frames=makes(encoder, config, tokenizer, load_video_settings(folder)))
    except (ConfigError, ModelError) as error:
        why = str(error)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        why = repr(error)
    return replace(encoder, videos_unread=f"{folder}: video_preprocessor_config.json (or processor_config.json): {why}")


def qwen2_frames(encoder: Any, config: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Frames:
    """Two frames a token, each of its own size; positions count patches (Qwen2-VL)."""
    return _patched(encoder, settings)


def qwen2_5_frames(encoder: Any, config: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Frames:
    """As `qwen2_frames`; positions count seconds (Qwen2.5-VL)."""
    return _patched(encoder, settings, times="interval")


def qwen3_frames(encoder: Any, config: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Frames:
    """Two frames a token, bounded by the pixels of all; each two with their time in front (Qwen3-VL)."""
    names = {"video_token": "video_token_id", "before": "vision_start_token_id", "after": "vision_end_token_id"}
    texts = {part: token_of(tokenizer, config, name) for part, name in names.items()}
    return _patched(encoder, settings, times="text", **texts)


def _patched(encoder: Any, settings: Mapping[str, Any], **options: Any) -> PatchedFrames:
    frames = PatchedFrames.of(encoder.processor, settings, **options)
    for name in encoder.keys:
        found, wanted = getattr(frames.processor, name), getattr(encoder.processor, name)
        if found != wanted:
            raise ModelError(f"{name} is {found}, expected {wanted} as for pictures; use files of one checkpoint")
    return frames


def onevision_frames(encoder: Any, config: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Frames:
    """A frame's tokens pooled to half its rows and columns, rounded up; a newline token ends the video (LLaVA-OneVision)."""
    side = ceil(patches_of(config) / 2)
    return FixedFrames(images=_fixed(encoder, config, settings, side, uneven_patch_of(config)), newline=True)


def next_video_frames(encoder: Any, config: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Frames:
    """A frame's tokens pooled by the model's stride; patches that fill no square of it are seen by none (LLaVA-NeXT-Video)."""
    stride = side_of(config, "spatial_pool_stride")
    step = stride * patch_size_of(config)
    uneven = step if image_size_of(config) % step else None
    return FixedFrames(images=_fixed(encoder, config, settings, patches_of(config) // stride, uneven))


def internvl_frames(encoder: Any, config: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Frames:
    """A frame is one tile with its number in front (InternVL)."""
    return FixedFrames(images=_fixed(encoder, config, settings, encoder.grid[0], None))


def smolvlm_frames(encoder: Any, config: Any, tokenizer: Any, settings: Mapping[str, Any]) -> Frames:
    """A frame is one tile with its time in front (SmolVLM)."""
    frames = SquaredFrames.of(encoder.processor, settings)
    side = dict(frames.processor.max_image_size).get("longest_edge")
    if side != encoder.side:
        raise ModelError(
            f"max_image_size is {side}, expected {encoder.side} as for pictures; use files of one checkpoint"
        )
    return frames


def _fixed(encoder: Any, config: Any, settings: Mapping[str, Any], side: int, patch: int | None) -> ImageEncoder:
    """Pixels of a frame as the tower reads them, seen through ``side`` x ``side`` tokens."""
    processor = FixedFrames.plain_processor(encoder.processor, settings)
    images = ImageEncoder.from_processor(processor, (side, side), patch_size=patch)
    found, wanted = images(PIL.Image.new("RGB", (64, 64))).inputs["pixel_values"].shape[-1], image_size_of(config)
    if found != wanted:
        raise ModelError(
            f"frames are made of {found} pixels a side (size, crop_size), the tower reads {wanted} "
            "(vision_config.image_size of config.json); use files of one checkpoint"
        )
    return images

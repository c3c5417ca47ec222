"""`preprocessor_config.json` as published checkpoints have it: loaded, laid out, and the counts their papers state."""

import json

import numpy as np
import PIL.Image
import pytest

from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.images.layouts import image_encoder_from_dict
from vlm_distill_cache.data.images.layouts.any_resolution import AnyResolutionEncoder
from vlm_distill_cache.data.images.layouts.dynamic import DynamicEncoder
from vlm_distill_cache.data.images.layouts.framed import FramedEncoder
from vlm_distill_cache.data.images.layouts.split import SplitEncoder
from vlm_distill_cache.data.images.layouts.thumbnail import ThumbnailEncoder
from vlm_distill_cache.data.text.processors import load_image_processor

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
}  # fmt: skip
HALF = CLIP | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}


def framed(processor):
    fixed = ImageEncoder.from_processor(processor, (16, 16))
    return FramedEncoder(fixed=fixed, image_token="<image_soft_token>", before="", after="")


# stored settings, how they are laid out, fewest and most visual tokens, those of a picture of 640 x 480
PUBLISHED = {
    "Qwen2-VL": (
        CLIP | PATCHES | {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056},
        lambda processor: DynamicEncoder(processor=processor), (4, 16384, 17 * 23),
    ),
    "Qwen2.5-VL, sizes twice": (
        CLIP | PATCHES | {
            "image_processor_type": "Qwen2VLImageProcessorFast", "min_pixels": 3136, "max_pixels": 12845056,
            "size": {"min_pixels": 3136, "max_pixels": 12845056},
        },
        lambda processor: DynamicEncoder(processor=processor), (4, 16384, 17 * 23),
    ),
    "Qwen3-VL": (
        HALF | PATCHES | {
            "image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16,
            "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        },
        lambda processor: DynamicEncoder(processor=processor), (64, 16384, 15 * 20),
    ),
    "SmolVLM": (
        HALF | {
            "image_processor_type": "SmolVLMImageProcessor", "do_image_splitting": True, "do_pad": True, "resample": 1,
            "max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048},
        },
        lambda processor: SplitEncoder(processor=processor, grid=(8, 8), patch_size=16), (64, 17 * 64, 13 * 64),
    ),
    "InternVL3": (
        HALF | {
            "image_processor_type": "GotOcr2ImageProcessorFast", "crop_to_patches": False, "min_patches": 1,
            "max_patches": 12, "size": {"height": 448, "width": 448},
        },
        lambda processor: ThumbnailEncoder(processor=processor, grid=(16, 16)), (256, 13 * 256, 13 * 256),
    ),
    "Gemma 3": (
        HALF | {
            "image_processor_type": "Gemma3ImageProcessor", "do_convert_rgb": None, "do_pan_and_scan": None,
            "image_seq_length": 256, "resample": 2, "size": {"height": 896, "width": 896},
        },
        framed, (256, 256, 256),
    ),
    "PaliGemma": (
        HALF | {
            "image_processor_type": "SiglipImageProcessor", "image_seq_length": 256, "do_convert_rgb": None,
            "size": {"height": 224, "width": 224},
        },
        lambda processor: ImageEncoder.from_processor(processor, (16, 16)), (256, 256, 256),
    ),
    "LLaVA-NeXT": (
        CLIP | {
            "image_processor_type": "LlavaNextImageProcessor", "aspect_ratio_setting": "anyres", "do_pad": True,
            "do_center_crop": True, "crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336},
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        },
        lambda processor: AnyResolutionEncoder(processor=processor, patch_size=14), (576, 2928, 576 + 36 * 49),
    ),
    "LLaVA-OneVision": (
        HALF | {
            "image_processor_type": "LlavaOnevisionImageProcessor", "do_pad": True,
            "size": {"height": 384, "width": 384},
            "image_grid_pinpoints": [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)],
        },
        lambda processor: AnyResolutionEncoder(processor=processor, patch_size=14, most_tiles=9),
        (729, 729 + int(1.1**2 * 9 * 729) + 162, 729 + 40 * 55),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_give_the_published_numbers_of_visual_tokens(name, tmp_path):
    stored, build, (fewest, most, count) = PUBLISHED[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    processor = load_image_processor(tmp_path)
    assert type(processor).__name__.endswith("Pil")
    encoder = build(processor)
    assert (encoder.least_token_count, encoder.token_count) == (fewest, most)
    encoded = encoder(PIL.Image.fromarray(np.full((480, 640, 3), 99, np.uint8)))
    assert sum(tile.token_count for tile in encoded.tiles) == count
    processor.save_pretrained(tmp_path / "cache")
    again = load_image_processor(tmp_path / "cache")
    assert image_encoder_from_dict(json.loads(json.dumps(encoder.to_dict())), again).to_dict() == encoder.to_dict()

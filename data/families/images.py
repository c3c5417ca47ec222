"""How each family's pictures become visual tokens: from a configuration and a processor to an image encoder."""

from math import isqrt
from typing import Any

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.data.images.encoder import AnyImageEncoder, ImageEncoder
from vlm_distill_cache.data.images.layouts.any_resolution import AnyResolutionEncoder
from vlm_distill_cache.data.images.layouts.dynamic import DynamicEncoder
from vlm_distill_cache.data.images.layouts.framed import FramedEncoder
from vlm_distill_cache.data.images.layouts.split import SplitEncoder
from vlm_distill_cache.data.images.layouts.thumbnail import ThumbnailEncoder
from vlm_distill_cache.data.images.library import LibraryImages


def llava_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """One square picture, one grid of patches (LLaVA-1.5)."""
    _refuse_uneven(config)
    return fixed_images(config, processor, tokenizer)


def published_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """One picture, padded or squashed to a square as the configuration says (MobileVLM, CompoDistill).

    Their checkpoints store a CLIP processor with a centre crop and make the square in their own code.
    """
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    pooled = config.projector_type.startswith("ldp")  # 2 x 2 patches to one token
    drops = vision.model_type.startswith("siglip") and config.vision_feature_select_strategy == "patch"
    return ImageEncoder(
        processor=processor,
        layout=config.image_aspect_ratio,
        grid=((side + 1) // 2,) * 2 if pooled else (side, side),
        patch_size=_uneven_patch(config),
        drops_first=drops,
    )


def any_resolution_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """The whole picture, then its tiles with newline tokens (LLaVA-NeXT, LLaVA-OneVision).

    Raises:
        ModelError: If the processor chooses tiles from another list of resolutions than the model.
    """
    _refuse_uneven(config)
    wanted = [list(pair) for pair in config.image_grid_pinpoints]
    found = [list(pair) for pair in getattr(processor, "image_grid_pinpoints", None) or ()]
    if wanted != found:
        raise ModelError(
            f"image_grid_pinpoints differ between config.json ({wanted}) and preprocessor_config.json ({found}); "
            "the model would read the tiles in another arrangement: use files of one checkpoint"
        )
    ratio = str(getattr(config, "vision_aspect_ratio", None) or "")
    return AnyResolutionEncoder(
        processor=processor,
        patch_size=config.vision_config.patch_size,
        most_tiles=int(ratio.removeprefix("anyres_max_")) if ratio.startswith("anyres_max_") else None,
    )


def qwen_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """The picture at its own size, one token for 2 x 2 patches (Qwen2-VL, 2.5, 3)."""
    return DynamicEncoder(processor=processor)


def split_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """Tiles between tags, then the whole picture (Idefics 3, SmolVLM)."""
    patch = config.vision_config.patch_size
    side = int(dict(processor.max_image_size)["longest_edge"]) // patch // config.scale_factor
    return SplitEncoder(
        processor=processor,
        grid=(side, side),
        patch_size=patch,
        image_token=_token(tokenizer, config.image_token_id),
    )


def internvl_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """Tiles, then a thumbnail, in one run between two tags (InternVL)."""
    vision = config.vision_config
    size, patch = (value if isinstance(value, int) else value[0] for value in (vision.image_size, vision.patch_size))
    side = int(size // patch * config.downsample_ratio)
    return ThumbnailEncoder(
        processor=processor, grid=(side, side), image_token=_token(tokenizer, config.image_token_id)
    )


def fixed_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """One square picture, all patches of a tower without a class token (PaliGemma)."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    return ImageEncoder.from_processor(processor, (side, side), patch_size=_uneven_patch(config))


def gemma3_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """One square picture, pooled to a fixed number of tokens, between tags (Gemma 3)."""
    side = isqrt(config.mm_tokens_per_image)
    begin, end = (_token(tokenizer, index) for index in (config.boi_token_index, config.eoi_token_index))
    return FramedEncoder(
        fixed=ImageEncoder.from_processor(processor, (side, side)),
        image_token=_token(tokenizer, config.image_token_id),
        before=f"\n\n{begin}",
        after=f"{end}\n\n",
        marker=begin,
    )


def library_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """Whatever the library's own processor does; where its visual tokens look is unknown."""
    return LibraryImages(library=processor, image_token_id=image_token_id(config))


def image_token_id(config: Any) -> int:
    """Id that stands for one visual token in ``input_ids``; `ModelError` if the configuration names none."""
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ModelError(
        f"a configuration of model_type {config.model_type!r} names no image_token_id: its visual tokens "
        "cannot be found; expected a vision-language model with image tokens in its vocabulary"
    )


def _uneven_patch(config: Any) -> int | None:
    """Pixels per patch where patches do not fill the picture exactly (SigLIP 384 / 14); None: they do."""
    vision = config.vision_config
    return int(vision.patch_size) if vision.image_size % vision.patch_size else None


def _token(tokenizer: Any, index: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(int(index)))


def _refuse_uneven(config: Any) -> None:
    """Refuse a configuration whose visual tokens are no grid, because of the tower's class token."""
    vision = config.vision_config
    side = int(vision.image_size // vision.patch_size)
    has_class_token = vision.model_type.startswith("clip")
    drops_first = config.vision_feature_select_strategy == "default"
    if has_class_token != drops_first:
        raise ModelError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} with a "
            f"{vision.model_type} tower gives {side * side + (1 if has_class_token else -1)} visual tokens, "
            f"which is no {side}x{side} grid; set it to {'default' if has_class_token else 'full'!r} "
            "in the checkpoint's config.json"
        )

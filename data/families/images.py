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
    side = patches_of(config)
    pooled = config.projector_type.startswith("ldp") or config.pool_teacher_tokens  # 2 x 2 patches to one token
    drops = vision.model_type.startswith("siglip") and config.vision_feature_select_strategy == "patch"
    return ImageEncoder(
        processor=processor,
        layout=config.image_aspect_ratio,
        grid=((side + 1) // 2,) * 2 if pooled else (side, side),
        patch_size=uneven_patch_of(config),
        drops_first=drops,
    )


def any_resolution_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """The whole picture, then its tiles with newline tokens (LLaVA-NeXT, LLaVA-OneVision).

    Raises:
        ModelError: If the processor chooses tiles from another list of resolutions than the model, or cuts them of
            another size than the tower's.
    """
    _refuse_uneven(config)
    wanted, found = (getattr(part, "image_grid_pinpoints", None) for part in (config, processor))
    if _resolutions(wanted) is None or _resolutions(wanted) != _resolutions(found):
        raise ModelError(
            f"image_grid_pinpoints differ between config.json ({wanted}) and preprocessor_config.json ({found}), or are no "
            "lists of [height, width]; the model would read the tiles in another arrangement: use files of one checkpoint"
        )
    ratio = str(getattr(config, "vision_aspect_ratio", None) or "")
    most = ratio.removeprefix("anyres_max_") if ratio.startswith("anyres_max_") else None
    if most is not None and not (most.isdecimal() and int(most)):
        raise ModelError(f"config.json: vision_aspect_ratio is {ratio!r}, expected 'anyres_max_' and a number, like 9")
    encoder = AnyResolutionEncoder(
        processor=processor, patch_size=patch_size_of(config), most_tiles=None if most is None else int(most)
    )
    if encoder.side != image_size_of(config):
        raise ModelError(
            f"preprocessor_config.json cuts tiles of {encoder.side} pixels (size, crop_size), the tower of config.json "
            f"reads {image_size_of(config)} (vision_config.image_size); use files of one checkpoint"
        )
    return encoder


def qwen_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """The picture at its own size, one token for 2 x 2 patches (Qwen2-VL, 2.5, 3).

    Raises:
        ModelError: If processor and tower cut pictures into other patches.
    """
    encoder = DynamicEncoder(processor=processor)
    for ours, theirs in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    ):
        found, wanted = getattr(processor, ours), side_of(config, f"vision_config.{theirs}")
        if found != wanted:
            raise ModelError(
                f"preprocessor_config.json: {ours} is {found}, expected {wanted}, which vision_config.{theirs} of config.json "
                "is; use files of one checkpoint"
            )
    return encoder


def split_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """Tiles between tags, then the whole picture (Idefics 3, SmolVLM).

    Raises:
        ModelError: If a tile's patches cannot be merged evenly.
    """
    patch, factor = patch_size_of(config), side_of(config, "scale_factor")
    # Its checks come first: without a side there is no grid.
    tile = SplitEncoder(processor=processor, grid=(1, 1), patch_size=patch).side
    side, rest = divmod(tile // patch, factor)
    if rest or not side:
        raise ModelError(
            f"preprocessor_config.json: tiles of {tile} pixels (longest_edge of max_image_size) have {tile // patch} patches "
            f"of {patch} a side, which scale_factor={factor} of config.json does not divide; use files of one checkpoint"
        )
    return SplitEncoder(
        processor=processor,
        grid=(side, side),
        patch_size=patch,
        image_token=token_of(tokenizer, config, "image_token_id"),
    )


def internvl_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """Tiles, then a thumbnail, in one run between two tags (InternVL).

    Raises:
        ModelError: If a tile's patches cannot be merged evenly.
    """
    ratio = config.downsample_ratio
    side = patches_of(config) * ratio if isinstance(ratio, int | float) else 0
    if side < 1 or side != int(side):
        raise ModelError(
            f"config.json: downsample_ratio={ratio!r} makes no whole number of visual tokens of {patches_of(config)} patches a "
            "side; use the config.json of the checkpoint"
        )
    return ThumbnailEncoder(
        processor=processor,
        grid=(int(side), int(side)),
        image_token=token_of(tokenizer, config, "image_token_id"),
    )


def fixed_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """One square picture, all patches of a tower without a class token (PaliGemma)."""
    side = patches_of(config)
    return ImageEncoder.from_processor(processor, (side, side), patch_size=uneven_patch_of(config))


def gemma3_images(config: Any, processor: Any, tokenizer: Any) -> AnyImageEncoder:
    """One square picture, pooled to a fixed number of tokens, between tags (Gemma 3).

    Raises:
        ModelError: If the patches cannot be pooled to that number.
    """
    tokens, patches = side_of(config, "mm_tokens_per_image"), patches_of(config)
    side = isqrt(tokens)
    pool = patches // side
    if side * side != tokens or not pool or patches // pool != side:
        raise ModelError(
            f"config.json: mm_tokens_per_image={tokens} is no square that {patches} x {patches} patches can be pooled to "
            "(vision_config.image_size and patch_size); use the config.json of the checkpoint"
        )
    pixels = pool * patch_size_of(config)  # per visual token
    begin, end = (token_of(tokenizer, config, name) for name in ("boi_token_index", "eoi_token_index"))
    return FramedEncoder(
        fixed=ImageEncoder.from_processor(
            processor, (side, side), patch_size=pixels if image_size_of(config) != side * pixels else None
        ),
        image_token=token_of(tokenizer, config, "image_token_id"),
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


def side_of(config: Any, name: str) -> int:
    """A number of pixels, patches or tokens in a configuration, by its dotted name; of a pair of equal ones, one.

    Raises:
        ModelError: If it is missing, or no whole number of at least 1.
    """
    value = config
    for part in name.split("."):
        value = getattr(value, part, None)
    pair = list(value) if isinstance(value, list | tuple) else [value]
    if not pair or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 or v != pair[0] for v in pair):
        raise ModelError(
            f"config.json: {name} is {value!r}, expected a whole number of at least 1 (or two equal ones); use the "
            "config.json of the checkpoint"
        )
    return int(pair[0])


def image_size_of(config: Any) -> int:
    """Pixels per side of the tower's picture."""
    return side_of(config, "vision_config.image_size")


def patch_size_of(config: Any) -> int:
    """Pixels per side of one of its patches."""
    return side_of(config, "vision_config.patch_size")


def patches_of(config: Any) -> int:
    """Patches per side of the tower's picture; `ModelError` if there are none."""
    patches = image_size_of(config) // patch_size_of(config)
    if not patches:
        raise ModelError(
            f"config.json: vision_config.patch_size is {patch_size_of(config)}, expected at most vision_config.image_size, "
            f"{image_size_of(config)}"
        )
    return patches


def _resolutions(stored: Any) -> list[list[int]] | None:
    """A list of heights and widths; None if it is none."""
    try:
        return [[int(height), int(width)] for height, width in stored] or None
    except (TypeError, ValueError):
        return None


def uneven_patch_of(config: Any) -> int | None:
    """Pixels per patch where patches do not fill the picture exactly (SigLIP 384 / 14); None: they do."""
    return patch_size_of(config) if image_size_of(config) % patch_size_of(config) else None


def token_of(tokenizer: Any, config: Any, name: str) -> str:
    """The text of a token that a configuration names by its id; `ModelError` if the tokenizer has none."""
    index = getattr(config, name, None)
    token = None
    if isinstance(index, int) and 0 <= index < len(tokenizer):
        token = tokenizer.convert_ids_to_tokens(index)
    if token is None:
        raise ModelError(
            f"config.json: {name} is {index!r}, expected the id of one of the tokenizer's {len(tokenizer)} tokens; use "
            "config.json and tokenizer of one checkpoint"
        )
    return str(token)


def _refuse_uneven(config: Any) -> None:
    """Refuse a configuration whose visual tokens are no grid, because of the tower's class token."""
    vision, side = config.vision_config, patches_of(config)
    layers = config.vision_feature_layer
    depth = int(vision.num_hidden_layers)
    named = [layers] if isinstance(layers, int) else list(layers or ())
    if not named or not all(isinstance(layer, int) and -depth - 1 <= layer <= depth for layer in named):
        raise ModelError(
            f"config.json: vision_feature_layer is {layers!r}, but the tower has {depth} layers (vision_config."
            f"num_hidden_layers): expected one from 0 to {depth} or from -1 to {-depth - 1}, or a list of such"
        )
    has_class_token = vision.model_type.startswith("clip")
    drops_first = config.vision_feature_select_strategy == "default"
    if has_class_token != drops_first:
        raise ModelError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} with a "
            f"{vision.model_type} tower gives {side * side + (1 if has_class_token else -1)} visual tokens, "
            f"which is no {side}x{side} grid; set it to {'default' if has_class_token else 'full'!r} "
            "in the checkpoint's config.json"
        )

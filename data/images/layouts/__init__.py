"""How each model family cuts a picture into visual tokens: one image encoder per layout.

| kind | families | picture | visual tokens |
|---|---|---|---|
| (none): `data.images.encoder` | LLaVA-1.5, MobileVLM, CompoDistill, PaliGemma | squashed, padded or cropped | one fixed grid |
| `framed` | Gemma 3 | squashed | one fixed grid between tags |
| `any_resolution` | LLaVA-NeXT, LLaVA-OneVision | scaled, padded, cut into tiles | small picture, joined tiles with newlines |
| `split` | Idefics 3, SmolVLM | stretched, cut into tiles | each tile between tags, then the whole |
| `thumbnail` | InternVL | stretched, cut into tiles | tile after tile, then the whole |
| `dynamic` | Qwen2-VL, 2.5, 3 | rounded to whole tokens | one grid, its size follows the picture |

Pixels always come from the model library's own PIL processor. An encoder's `to_dict` is a plan's ``geometry``;
`image_encoder_from_dict` is its inverse.
"""

from collections.abc import Mapping
from typing import Any

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.data.images.encoder import AnyImageEncoder, ImageEncoder
from vlm_distill_cache.data.images.layouts.any_resolution import AnyResolutionEncoder
from vlm_distill_cache.data.images.layouts.dynamic import DynamicEncoder
from vlm_distill_cache.data.images.layouts.framed import FramedEncoder
from vlm_distill_cache.data.images.layouts.split import SplitEncoder
from vlm_distill_cache.data.images.layouts.thumbnail import ThumbnailEncoder

KINDS: dict[str, Any] = {
    layout.kind: layout for layout in (AnyResolutionEncoder, SplitEncoder, ThumbnailEncoder, DynamicEncoder)
}


def image_encoder_from_dict(geometry: Mapping[str, Any], processor: Any) -> AnyImageEncoder:
    """Rebuild an image encoder from its dict and the PIL image processor it was made with.

    Args:
        geometry: From ``to_dict``; without a ``kind`` that of the fixed `ImageEncoder`.
        processor: From ``data.text.processors.load_image_processor``.

    Raises:
        ConfigError: The kind is unknown, fields are missing, or the processor's settings are others.
    """
    encoder = _rebuild(dict(geometry), processor)
    wanted, got = geometry.get("processor"), encoder.to_dict()["processor"]
    if not isinstance(wanted, Mapping):
        raise ConfigError("the stored geometry does not say how its image processor was set; train or build it again")
    different = sorted(key for key in wanted if wanted[key] != got.get(key))
    if different:
        key = different[0]
        raise ConfigError(
            f"the image processor's {key} is {got.get(key)}, the stored geometry was made with {wanted[key]}; "
            "use the preprocessor_config.json that lies beside it"
        )
    return encoder


def _rebuild(stored: dict[str, Any], processor: Any) -> AnyImageEncoder:
    kind = stored.pop("kind", None)
    texts = {name: stored.pop(name) for name in ("image_token", "before", "after", "marker") if name in stored}
    try:
        del stored["processor"]
        if "grid" in stored:
            rows, cols = stored["grid"]
            stored["grid"] = (int(rows), int(cols))
        if kind is None:
            return ImageEncoder(processor=processor, **stored)
        if kind == FramedEncoder.kind:
            return FramedEncoder(fixed=ImageEncoder(processor=processor, **stored), **texts)
        if kind not in KINDS:
            known = ", ".join([*KINDS, FramedEncoder.kind])
            raise ConfigError(f"image geometry of kind {kind!r} is unknown; known: {known}; update the package")
        encoder: AnyImageEncoder = KINDS[kind](processor=processor, **stored, **texts)
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"stored image geometry cannot be read: {error!r}; got {stored}") from error
    return encoder

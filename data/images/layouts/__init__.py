"""How each model family cuts a picture into visual tokens: one image encoder per layout.

| kind | families | picture | visual tokens |
|---|---|---|---|
| (none): `data.images.encoder` | LLaVA-1.5, MobileVLM, CompoDistill, PaliGemma | squashed, padded or cropped | one fixed grid |
| `framed` | Gemma 3 | squashed | one fixed grid between tags |
| `any_resolution` | LLaVA-NeXT, LLaVA-OneVision | scaled, padded, cut into tiles | small picture, joined tiles with newlines |
| `split` | Idefics 3, SmolVLM | stretched, cut into tiles | each tile between tags, then the whole |
| `thumbnail` | InternVL | stretched, cut into tiles | tile after tile, then the whole |
| `dynamic` | Qwen2-VL, 2.5, 3 | rounded to whole tokens | one grid, its size follows the picture |

Some read a video otherwise than as so many pictures (`data.images.layouts.videos`). Pixels always come from the model
library's own PIL processor. An encoder's `to_dict` is a plan's ``geometry``;
`image_encoder_from_dict` is its inverse.
"""

from collections.abc import Mapping
from typing import Any

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.data.images.encoder import AnyImageEncoder, ImageEncoder, VideoEncoder
from vlm_distill_cache.data.images.layouts.any_resolution import AnyResolutionEncoder
from vlm_distill_cache.data.images.layouts.dynamic import DynamicEncoder
from vlm_distill_cache.data.images.layouts.framed import FramedEncoder
from vlm_distill_cache.data.images.layouts.split import SplitEncoder
from vlm_distill_cache.data.images.layouts.thumbnail import ThumbnailEncoder
from vlm_distill_cache.data.images.layouts.videos import FixedFrames, PatchedFrames, SquaredFrames

KINDS: dict[str, Any] = {
    layout.kind: layout for layout in (AnyResolutionEncoder, SplitEncoder, ThumbnailEncoder, DynamicEncoder)
}
FRAMES: dict[str, Any] = {
    AnyResolutionEncoder.kind: FixedFrames,
    ThumbnailEncoder.kind: FixedFrames,
    SplitEncoder.kind: SquaredFrames,
    DynamicEncoder.kind: PatchedFrames,
}


def geometry_of(encoder: AnyImageEncoder, *, videos: bool) -> dict[str, Any]:
    """What decides pixels and boxes, as plain JSON for a plan and its fingerprint.

    Args:
        videos: Whether the data has videos: what decides theirs is then told, too, as ``video``. Without, nothing is, so
            that plans of pictures stay what they are.
    """
    own = encoder.video_dict() if videos and isinstance(encoder, VideoEncoder) else {}
    return encoder.to_dict() | ({"video": own} if own else {})


def image_encoder_from_dict(geometry: Mapping[str, Any], processor: Any) -> AnyImageEncoder:
    """Rebuild an image encoder from its dict and the PIL image processor it was made with.

    Args:
        geometry: From ``to_dict`` or `geometry_of`; without a ``kind`` that of the fixed `ImageEncoder`.
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
    kind, video = stored.pop("kind", None), stored.pop("video", None)
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
        frames = {} if video is None else {"frames": FRAMES[kind].from_dict(video, processor)}
        encoder: AnyImageEncoder = KINDS[kind](processor=processor, **stored, **texts, **frames)
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"stored image geometry cannot be read: {error!r}; got {stored}") from error
    return encoder

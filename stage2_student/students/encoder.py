"""From samples to a student's sequences: described beside the student, which outlives its cache, and rebuilt.

A student reads pictures and text in its own way. Where it has none (it is made from a cache's vision tower, or its
folder holds weights alone) the way of the cache's teacher is the only one that fits.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.plan import LONG_SAMPLES, Plan
from vlm_distill_cache.common.cache.schema import ONE_PICTURE
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, ModelError
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.images.encoder import AnyImageEncoder, ImageEncoder, VideoEncoder
from vlm_distill_cache.data.images.layouts import image_encoder_from_dict
from vlm_distill_cache.data.sample import FrameSampling
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.media import PicturesBeyond
from vlm_distill_cache.data.text.processors import load_image_processor, load_tokenizer
from vlm_distill_cache.data.text.templates import PromptTemplate

MAX_LENGTH = 2048  # tokens, where neither the run nor a cache says one
PICTURE_SETTINGS = ("sampling", "video_token_id", "most_pictures", "pictures_beyond", "visual_token_budget")
"""What a `SampleEncoder` knows of several pictures and videos."""
UNKNOWN_GEOMETRY = "library"
"""Kind of the image encoders that know how many visual tokens there are, and not where they look."""


def load_processors(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and image processor in a folder: a cache's ``processor/``, or a trained student."""
    try:
        return load_tokenizer(folder), load_image_processor(folder)
    except ModelError as error:
        raise CacheFormatError(f"{error}; the folder is incomplete: build it again") from error


def knows_boxes(geometry: Mapping[str, Any]) -> bool:
    """Whether the boxes of visual tokens are known, so that two models' attention can meet."""
    return geometry.get("kind") != UNKNOWN_GEOMETRY


def cache_image_encoder(
    geometry: Mapping[str, Any], image_processor: Any, *, grid: tuple[int, int] | None = None, where: str
) -> AnyImageEncoder:
    """The image encoder that a cache's plan describes.

    Args:
        grid: Rows and columns of the visual tokens of a student that reads the same pixels; None: the teacher's.
    """
    if grid is not None and "kind" in geometry:
        raise ConfigError(
            f"{where} has no image processor of its own, and the cache's teacher reads pictures in another way "
            f"(kind {geometry['kind']!r}) than as one square of fixed size; give a student directory that holds "
            "its preprocessor_config.json"
        )
    encoder: AnyImageEncoder = image_encoder_from_dict(geometry, image_processor)
    return encoder.with_grid(grid) if grid is not None and isinstance(encoder, ImageEncoder) else encoder


def pictures_taken(
    model_config: Any,
    image_encoder: AnyImageEncoder,
    plan: Plan | None = None,
    *,
    fps: float | None = None,
    most: int | None = None,
    most_pictures: int | None = None,
    pictures_beyond: PicturesBeyond = "refuse",
    visual_token_budget: int | None = None,
) -> dict[str, Any]:
    """What a student's `SampleEncoder` is told of samples with several pictures and videos.

    Args:
        model_config: The student's, of the model library.
        plan: Of a cache, whose teacher read the frames that a student reads if nothing else is said; None: there is none.
        fps: Frames a second; None: the plan's.
        most: Frames of a video; None: the plan's.
        most_pictures: None: as many as the student's family takes; more than these is the family's number.
    """
    read = {**vars(FrameSampling()), **((plan.extra.get("frames") if plan else None) or {})}
    limits = [limit for limit in (most_pictures, family_of(str(model_config.model_type)).most_pictures) if limit]
    return {
        "sampling": FrameSampling(fps=float(fps or read["fps"]), most=int(most or read["most"])),
        "video_token_id": _video_token_id(model_config, image_encoder),
        "most_pictures": min(limits, default=None),
        "pictures_beyond": pictures_beyond,
        "visual_token_budget": visual_token_budget,
    }


def _video_token_id(model_config: Any, image_encoder: AnyImageEncoder) -> int | None:
    """The token at the visual positions of a video; None: the student reads frames as so many pictures."""
    if not isinstance(image_encoder, VideoEncoder):
        return None
    names = ("video_token_id", "video_token_index")
    return next((int(found) for name in names if (found := getattr(model_config, name, None)) is not None), None)


def _described_pictures(encoder: SampleEncoder) -> dict[str, Any]:
    """What of `pictures_taken` is not as in `SampleEncoder`, JSON."""
    plain = {entry.name: entry.default for entry in fields(SampleEncoder)}
    found: dict[str, Any] = {
        name: getattr(encoder, name) for name in PICTURE_SETTINGS if getattr(encoder, name) != plain[name]
    }
    return found | ({"sampling": dict(vars(encoder.sampling))} if encoder.sampling else {})


def describe_encoder(encoder: SampleEncoder) -> dict[str, Any]:
    """What turns a sample into a student's sequence, as JSON; kept beside the student."""
    return {
        "template": encoder.template.to_dict(),
        "geometry": encoder.image_encoder.to_dict(),
        "image_token_id": encoder.image_token_id,
        "max_length": encoder.max_length,
        **_described_pictures(encoder),
    }


def build_encoder(
    description: Mapping[str, Any],
    tokenizer: Any,
    image_processor: Any,
    *,
    image_encoder: AnyImageEncoder | None = None,
    grid: tuple[int, int] | None = None,
    positions: int | None = None,
) -> SampleEncoder:
    """The encoder of a student.

    Args:
        image_encoder: The student's, where its model makes it; None: the described one.
        grid: Rows and columns of the student's visual tokens, for descriptions of old without them.
        positions: Tokens that the student knows, as `SampleEncoder.positions`.
    """
    if image_encoder is None and "geometry" in description:
        image_encoder = image_encoder_from_dict(description["geometry"], image_processor)
    elif image_encoder is None:
        # Before a student could have its own geometry, layout and patch size were all that was kept.
        if grid is None:
            raise ConfigError("an encoder described without geometry needs the grid of the student's tokens")
        image_encoder = ImageEncoder(
            processor=image_processor, layout=description["layout"], grid=grid, patch_size=description.get("patch_size")
        )
    taken = {name: description[name] for name in PICTURE_SETTINGS if name in description}
    if "sampling" in taken:
        taken["sampling"] = FrameSampling(**taken["sampling"])
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=image_encoder,
        template=PromptTemplate.from_dict(dict(description["template"])),
        image_token_id=description["image_token_id"],
        max_length=description["max_length"],
        positions=positions,
        **taken,
    )


def encoder_of_cache(plan: Plan, folder: Path, *, max_length: int | None) -> SampleEncoder | None:
    """How the teacher of a cache read its samples; None where that is known to the model library alone."""
    if not knows_boxes(plan.geometry):
        return None
    tokenizer, image_processor = load_processors(folder)
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=cache_image_encoder(plan.geometry, image_processor, where=str(folder)),
        template=PromptTemplate.from_dict(plan.template, origin=str(folder)),
        image_token_id=plan.stated("teacher.image_token_id", folder.parent),
        max_length=max_length or longest_sequence(plan),
        long_samples="truncate" if plan.extra.get(LONG_SAMPLES) == "truncate" else "refuse",
        most_pictures=1 if plan.format_version == ONE_PICTURE else None,
        sampling=FrameSampling(**plan.extra["frames"]) if plan.extra.get("frames") else None,
        video_token_id=plan.teacher.get("video_token_id"),
    )


def longest_sequence(plan: Plan) -> int:
    """Tokens of the longest sequence that a cache could hold; a cache of unknown provenance says nothing of this."""
    return int(plan.extra.get("max_length", MAX_LENGTH))

"""A run's student with what it reads: made from a cache's parts, or opened from a directory of any family."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL.Image
from torch import nn

from vlm_distill_cache.common.attention.hidden import kept_layers
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.files.rules import AGAIN, shown
from vlm_distill_cache.common.hub import model_folder
from vlm_distill_cache.common.models.parts import describe_lost_tokenizer, has_tokenizer
from vlm_distill_cache.common.models.projectors import TeacherAdapter
from vlm_distill_cache.common.models.published import is_own, is_published
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.data.families.inputs import known_positions
from vlm_distill_cache.data.families.models import open_family_settings
from vlm_distill_cache.data.families.table import FAMILIES, family_of
from vlm_distill_cache.data.images.encoder import AnyImageEncoder, ImageEncoder
from vlm_distill_cache.data.images.layouts import image_encoder_from_dict
from vlm_distill_cache.data.images.library import load_processor
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.processors import load_image_processor, load_tokenizer
from vlm_distill_cache.data.text.templates import PromptTemplate, get_template
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE, read_final, read_provenance
from vlm_distill_cache.stage2_student.pruned_folder import read_settings, refuse_damaged
from vlm_distill_cache.stage2_student.students.build import find_student, own_image_encoder
from vlm_distill_cache.stage2_student.students.encoder import (
    build_encoder,
    cache_image_encoder,
    load_processors,
    pictures_taken,
)
from vlm_distill_cache.stage2_student.students.library import LibraryStudent, OpenedStudent, find_library_student
from vlm_distill_cache.stage2_student.students.model import StudentModel
from vlm_distill_cache.stage2_student.students.presets import split_student_name, student_folder

LONGEST = 32_768  # tokens of a sequence, where a model does not say how many positions it knows
_ONE_SIZE = ("clip_vision_model", "siglip_vision_model")  # without interpolation, the library's default


@dataclass(frozen=True, kw_only=True)
class StudentParts:
    """A student and what it reads with.

    Attributes:
        model: On no device (meta): what it is made of, and none of its values.
        load: Makes it or reads it: on the CPU, in float32.
        template: Its own prompt template, where the cache's is of another tokenizer; None: the cache's fits any.
        where: Whose tokenizer and pictures these are, for errors.
    """

    model: StudentModel
    load: Callable[[], StudentModel]
    tokenizer: Any
    image_processor: Any
    image_encoder: AnyImageEncoder
    image_token_id: int
    template: PromptTemplate | None
    where: str

    @property
    def depth(self) -> int:
        """Layers of the language model."""
        return int(self.model.language_model.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Of the language model."""
        return int(self.model.language_model.config.hidden_size)

    def kept_layers(self, teacher_depth: int) -> tuple[int, ...] | None:
        """Which of the layers of a teacher of this depth are its own; None: it was not cut out of one."""
        return kept_layers(self.model.language_model.config, teacher_depth=teacher_depth)

    @property
    def visual_rows(self) -> str:
        """What a visual token sees: ``causal``, its whole ``image``, or the whole ``prefix``."""
        return self.model.family.visual_rows if isinstance(self.model, LibraryStudent) else "causal"


def teacher_tower(model: StudentModel) -> nn.Module | None:
    """The vision tower of a student with the teacher's projector (TAF), which must be the teacher's; else None."""
    if isinstance(model, VisionLanguageModel) and isinstance(model.model.mm_projector, TeacherAdapter):
        tower: nn.Module = model.vision_encoder
        return tower
    return None


def open_parts(config: TrainConfig, cache: TeacherCache) -> StudentParts:
    """Find the student that a run names, and open what it reads with."""
    name, size = split_student_name(config.student)
    given = student_folder(config.student, config.student_weights)
    if given is not None:
        refuse_damaged(given)
        if (given / PROVENANCE).exists():
            read_final(given)
        if "quantization_config" in read_settings(given / "config.json"):
            raise ModelError(
                f"student {given}: its weights are quantised (quantization_config in config.json), so they cannot be trained; "
                "give the model that it was made from"
            )
    if given is not None and not is_published(given):
        return _library_parts(config, given)
    name, folder = (name, Path(name)) if given is None else (str(given), given)
    cached_tokenizer, cached_processor = load_processors(cache.path / "processor")
    own_tokenizer = has_tokenizer(folder)
    # What we save has the cache's, and may lie without it; of a published model nobody knows that it is the same.
    if given is not None and not own_tokenizer and not is_own(given):
        raise ModelError(describe_lost_tokenizer(given))
    tokenizer = load_tokenizer(folder) if own_tokenizer else cached_tokenizer
    vision_tower = None if config.vision_tower is None else Path(config.vision_tower)
    model, load = find_student(
        name,
        cache_dir=cache.path,
        vocab_size=len(tokenizer),
        image_token_id=None if own_tokenizer else _cached_image_token(cache, tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        size=size,
        projector_type=config.projector,
        pool_teacher_tokens=config.pool_teacher_tokens,
        vision_tower=vision_tower,
        language_model=None if config.language_model is None else Path(config.language_model),
        seed=config.seed,
    )
    where = f"student {folder}" if own_tokenizer else f"{cache.place}/processor"
    image_processor, image_encoder = _mobilevlm_images(
        model, folder, cache, tokenizer, cached_processor, vision_tower=vision_tower
    )
    if isinstance(image_encoder, ImageEncoder):
        image_encoder = replace(image_encoder, drops_first=bool(model.dropped_tokens))
    return StudentParts(
        model=model,
        load=load,
        tokenizer=tokenizer,
        image_processor=image_processor,
        image_encoder=image_encoder,
        image_token_id=int(model.config.image_token_id),
        template=_trained_template(folder) or get_template("vicuna_v1"),
        where=where,
    )


def _library_parts(config: TrainConfig, folder: Path) -> StudentParts:
    if config.projector is not None or config.pool_teacher_tokens:
        raise ConfigError(
            f"projector={config.projector}, pool_teacher_tokens={config.pool_teacher_tokens}: student {folder} "
            "is a model of the library with a projector of its own; leave both unset (projector=null with a recipe), or use "
            "student=mobilevlm"
        )
    if config.language_model is not None:
        raise ConfigError(f"language_model={config.language_model}: student {folder} has a language model of its own")
    tower = None if config.vision_tower is None else Path(config.vision_tower)
    opened, load = find_library_student(folder, vision_tower=tower)

    def load_trainable() -> StudentModel:
        student = load()
        student.trainable_parameters("dft")
        return student

    return _opened_parts(opened, load_trainable, template=_trained_template(folder), where=f"student {folder}")


def lone_parts(folder: Path, *, dtype: str) -> StudentParts:
    """A model of any family as it lies in its folder, which is asked and not trained: a teacher, or anybody's.

    Args:
        dtype: Of its weights once they are loaded, a name of torch's.

    Raises:
        ModelError: If the folder holds no usable model.
    """
    opened, load = find_library_student(folder, dtype=dtype)
    built_in = folder / "training.json"  # of a built-in teacher, which says how it was asked
    named = read_json(built_in).get("template") if built_in.is_file() else None
    template = get_template(str(named or opened.model.family.template), opened.tokenizer)
    return _opened_parts(opened, load, template=template, where=f"model {folder}")


def lone_encoder(parts: StudentParts) -> SampleEncoder:
    """How a model of `lone_parts` reads samples: as long as it knows positions."""
    assert parts.template is not None
    positions = known_positions(parts.model.config)
    return SampleEncoder(
        tokenizer=parts.tokenizer,
        image_encoder=parts.image_encoder,
        template=parts.template,
        image_token_id=parts.image_token_id,
        max_length=positions or LONGEST,
        positions=positions,
        **pictures_taken(parts.model.config, parts.image_encoder),
    )


def model_parts(model: Any, processor: Any) -> StudentParts:
    """The parts of a caller's model, as they would be read from the folder that `save_pretrained` makes of it.

    Args:
        model: Of the model library, or of ours, without wrappers; it is neither changed nor copied.
        processor: What it reads with: a checkpoint's folder or name on the hub, the library's processor, or tokenizer and
            image processor.

    Raises:
        ModelError: If the two do not fit each other, or cannot be used.
    """
    where = f"student {type(model).__name__}"
    if model.get_output_embeddings() is None:
        raise ModelError(
            f"{where}: it has no output projection, so that it says no words; load it with "
            "AutoModelForImageTextToText.from_pretrained"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{where}: some of its weights are on the meta device, so without values; load them")
    if isinstance(processor, str | Path):
        source = model_folder(str(processor), what="processor").path
        listed = family_of(str(model.config.model_type)).is_listed
        processor = (load_tokenizer(source), load_image_processor(source)) if listed else load_processor(source)
    with TemporaryDirectory() as made:
        folder = Path(made)
        model.config.save_pretrained(folder)
        try:
            for part in processor if isinstance(processor, tuple | list) else (processor,):
                part.save_pretrained(folder)
            settings = open_family_settings(folder)
        except AttributeError as error:
            raise ModelError(
                f"{where}: its processor is {type(processor).__name__}, expected its checkpoint's folder or name on the hub, "
                "the library's processor (AutoProcessor.from_pretrained), or tokenizer and image processor as a tuple"
            ) from error
        except (ConfigError, ModelError) as error:
            raise type(error)(str(error).replace(str(folder), where)) from error
    student = LibraryStudent(model, settings.family)
    added = settings.tokenizer.get_added_vocab()
    told = getattr(processor, "image_token_id", None) or added.get("<image>")
    if told is not None and student.image_token_id not in (told, *added.values()):
        raise ModelError(
            f"{where}: its configuration has image token {student.image_token_id}, its processor {told}: they are of two "
            "checkpoints; take both from one"
        )
    opened = OpenedStudent(
        model=student,
        tokenizer=settings.tokenizer,
        image_processor=settings.processor,
        image_encoder=settings.image_encoder,
    )
    return _opened_parts(opened, lambda: student, template=None, where=where)


def _opened_parts(
    opened: OpenedStudent, load: Callable[[], StudentModel], *, template: PromptTemplate | None, where: str
) -> StudentParts:
    model = opened.model
    rows = int(model.get_input_embeddings().weight.shape[0])
    # An image token that is no token (LLaVA's original layout) is a place holder beyond the embedding.
    last = max(opened.tokenizer.vocab_size - 1, *({model.image_token_id} & {*opened.tokenizer.added_tokens_decoder}), 0)
    if last >= rows:
        raise ModelError(
            f"{where}: its embedding has {rows} rows, its tokenizer gives ids up to {last}: model and tokenizer are of two "
            "checkpoints; take both from one"
        )
    _check_pixels(opened, where)
    return StudentParts(
        model=model,
        load=load,
        tokenizer=opened.tokenizer,
        image_processor=opened.image_processor,
        image_encoder=opened.image_encoder,
        image_token_id=model.image_token_id,
        template=template or _default_template(model, opened.tokenizer),
        where=where,
    )


def _check_pixels(opened: OpenedStudent, where: str) -> None:
    """Refuse pictures of another size than a vision tower of one fixed size reads."""
    vision = getattr(opened.model.config, "vision_config", None)
    kind, size = getattr(vision, "model_type", None), getattr(vision, "image_size", None)
    if vision is None or not opened.model.family.is_listed or kind not in _ONE_SIZE or not isinstance(size, int):
        return
    found = opened.image_encoder(PIL.Image.new("RGB", (64, 64))).inputs["pixel_values"].shape[-2:]
    step = vision.patch_size if kind == "siglip_vision_model" else 1  # it reads whole patches, whatever is left over
    if {side // step for side in found} != {size // step}:
        raise ModelError(
            f"{where}: its processor makes pictures of {found[0]} x {found[1]} pixels, its vision tower reads {size} x {size} "
            "(vision_config.image_size): they are of two checkpoints; take both from one"
        )


def _cached_image_token(cache: TeacherCache, tokenizer: Any) -> int:
    """The token that a cache's prompt template writes for a picture, once; of most families the image token itself.

    Gemma 3's template writes ``<start_of_image>``, which its own processor opens out to tags and image tokens.
    """
    marker = cache.plan.geometry.get("marker")
    token = (
        tokenizer.convert_tokens_to_ids(marker) if marker else cache.plan.stated("teacher.image_token_id", cache.place)
    )
    if token is None or (marker and token == tokenizer.unk_token_id):
        raise CacheFormatError(
            f"{cache.place}: plan.json: geometry.marker is {shown(marker)}, expected a token of processor/; {AGAIN}"
        )
    return int(token)


def _mobilevlm_images(
    model: Any, folder: Path, cache: TeacherCache, tokenizer: Any, cached_processor: Any, *, vision_tower: Path | None
) -> tuple[Any, AnyImageEncoder]:
    """Image processor and encoder of a MobileVLM: its own where its folder has one, else the cache's."""
    if not any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        fresh = own_image_encoder(model, cache.plan.geometry, vision_tower=vision_tower)
        if fresh is not None:
            return fresh.processor, fresh
        encoder = cache_image_encoder(
            cache.plan.geometry, cached_processor, grid=model.image_grid, where=f"student {folder}"
        )
        return cached_processor, encoder
    processor = load_image_processor(folder)
    if (folder / PROVENANCE).exists():
        described = read_provenance(folder)["encoder"]
        encoder = build_encoder(described, tokenizer, processor, grid=model.image_grid).image_encoder
        return processor, encoder
    same = _as_the_cache(cache, processor, model.image_grid)
    if same is not None:
        return processor, same
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return processor, ImageEncoder.from_processor(processor, model.image_grid)
    own = family.image_encoder(model.config, processor, tokenizer)
    return processor, own.with_grid(model.image_grid) if isinstance(own, ImageEncoder) else own


def _as_the_cache(cache: TeacherCache, processor: Any, grid: tuple[int, int]) -> ImageEncoder | None:
    """The cache's layout, if a processor beside a student's weights is the very one of the cache; else None."""
    try:
        encoder = image_encoder_from_dict(cache.plan.geometry, processor)
    except ConfigError:  # another processor, or a geometry that only the library's whole processor has
        return None
    return encoder.with_grid(grid) if isinstance(encoder, ImageEncoder) else None


def _trained_template(folder: Path) -> PromptTemplate | None:
    """The template that a student of ours was trained with."""
    if not (folder / PROVENANCE).exists():
        return None
    return PromptTemplate.from_dict(read_provenance(folder)["encoder"]["template"], origin=str(folder))


def _default_template(model: LibraryStudent, tokenizer: Any) -> PromptTemplate | None:
    """The family's own; None where it is the tokenizer's and the tokenizer has none."""
    try:
        return get_template(model.family.template, tokenizer)
    except ConfigError:
        return None

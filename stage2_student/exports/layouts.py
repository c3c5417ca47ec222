"""The layouts that a trained student can be written in: one function each, by the name that the command line gives it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.models.changed import changes_of
from vlm_distill_cache.common.models.projectors import MlpProjector
from vlm_distill_cache.data.text.jinja_template import chat_template_of
from vlm_distill_cache.stage2_student.exports.adapter import write_adapter
from vlm_distill_cache.stage2_student.exports.folder import save_student_folder
from vlm_distill_cache.stage2_student.exports.gguf import write_gguf
from vlm_distill_cache.stage2_student.exports.llava import as_llava, with_image_token
from vlm_distill_cache.stage2_student.exports.published import write_published
from vlm_distill_cache.stage2_student.exports.source import Source, exported_model, refuse_changed
from vlm_distill_cache.stage2_student.students.library import LibraryStudent


def write_auto(target: Path, source: Source) -> Source:
    """Write a model of the library as it is; one of ours as a LLaVA where that is what it is, else with its code."""
    own = source.own
    linear = own is not None and isinstance(own.model.mm_projector, MlpProjector) and not own.dropped_tokens
    plain = type(source.core) is LlavaForConditionalGeneration
    if (linear or plain) and not changes_of(source.core.config):
        return write_llava(target, source)
    return _save(target, source, files=source.folder)


def write_llava(target: Path, source: Source) -> Source:
    """Write the library's LlavaForConditionalGeneration with its processor."""
    plain = with_image_token(as_llava(source))
    # What its folder holds of a processor is of code of ours, where its image token was none or its class is ours.
    kept = source.own is None and source.encoder.image_token_id in source.encoder.tokenizer.added_tokens_decoder
    return _save(target, plain, files=source.folder if kept else None)


def _save(target: Path, source: Source, *, files: Path | None) -> Source:
    model = exported_model(source)
    save_student_folder(
        target,
        model=LibraryStudent(model, source.model.family) if isinstance(source.model, LibraryStudent) else model,
        encoder=source.encoder,
        image_processor=source.image_processor,
        source=files,
    )
    return source


def write_llama_cpp(target: Path, source: Source) -> Source:
    """Write the two files that llama.cpp's programs read."""
    refuse_changed(source, "gguf")
    encoder = source.encoder
    write_gguf(
        target,
        model=source.model,
        tokenizer=encoder.tokenizer,
        image_processor=source.image_processor,
        template=chat_template_of(encoder.template, encoder.tokenizer, encoder.image_token),
        dtype=source.quantise or str(source.dtype).removeprefix("torch."),
    )
    return source


Writer = Callable[[Path, Source], Source]
"""Fills an empty folder; returns the student as it is read back from there."""

LAYOUTS: Mapping[str, Writer] = {
    "auto": write_auto,
    "published": write_published,
    "llava-hf": write_llava,
    "adapter": write_adapter,
    "gguf": write_llama_cpp,
}

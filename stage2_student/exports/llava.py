"""A student as the library's own LLaVA (``llava-hf``), which needs no code of ours.

Its projector is two linear layers, the first as wide as the language model; its tower's hidden state is projected token by
token; and ``<image>`` is a token of its own.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import (
    AddedToken,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
)

from vlm_distill_cache.common.models.original_llava import original_image_processor
from vlm_distill_cache.common.models.projectors import MlpProjector, TeacherAdapter
from vlm_distill_cache.common.models.published_configs import TOWER_PREFIX
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.stage2_student.exports.source import Source, refuse, refuse_changed
from vlm_distill_cache.stage2_student.students.library import LibraryStudent

IMAGE = "<image>"
_NAMES = (  # ours and the library's
    (TOWER_PREFIX, "model.vision_tower."),
    ("model.", "model.language_model."),
)
_PROJECTOR = "model.mm_projector."


def with_image_token(source: Source) -> Source:
    """A LLaVA as the library reads it: its image token is one of its tokenizer, with a row of the embedding.

    Rows that are added are zeros, and no text that it generates holds their tokens.
    """
    source = _square_pictures(source)
    core, tokenizer = source.core, source.encoder.tokenizer
    rows, index = core.get_input_embeddings().num_embeddings, source.encoder.image_token_id
    if index >= rows or index not in tokenizer.added_tokens_decoder:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
        index = tokenizer.convert_tokens_to_ids(IMAGE)
    if tokenizer.pad_token is None:  # or the processor would take one text at a time
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if index >= rows:
        core.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in (core.get_input_embeddings(), core.get_output_embeddings()):
                layer.weight[rows:] = 0
        core.generation_config.suppress_tokens = list(range(rows, len(tokenizer)))
    core.config.image_token_id = index
    vars(core.config).pop("auto_map", None)  # of code that took other tokens
    encoder = replace(source.encoder, tokenizer=tokenizer, image_token_id=index)
    return replace(source, encoder=encoder)


def as_llava(source: Source, *, layout: str = "llava-hf") -> Source:
    """The same student in the library's class.

    Raises:
        ModelError: If no LLaVA computes what it does.
    """
    refuse_changed(source, layout)
    own = source.own
    if own is None:
        if type(source.core) is not LlavaForConditionalGeneration:
            kind = source.core.config.model_type
            why = "its projector has not two linear layers" if kind == "llava" else f"it is a {kind}, and no LLaVA-1.5"
            raise refuse(source, layout, why)
        return source
    if own.dropped_tokens:
        raise refuse(
            source, layout, "it leaves out the first patch of its tower, which has no class token to leave out"
        )
    projector, act = _two_layers(source, own, layout)
    state = {f"model.multi_modal_projector.{name}": value for name, value in projector.items()}
    for name, value in own.state_dict().items():
        if not name.startswith(_PROJECTOR):
            ours, theirs = next((pair for pair in _NAMES if name.startswith(pair[0])), ("", ""))
            state[theirs + name.removeprefix(ours)] = value
    tower, text = own.model.vision_tower, own.config.text_config
    config = LlavaConfig(
        text_config=type(text).from_dict(text.to_dict()),
        vision_config=copy.deepcopy(own.config.vision_config),
        image_token_index=own.config.image_token_id,
        image_seq_length=source.encoder.image_encoder.token_count,
        projector_hidden_act=act,
        vision_feature_layer=own.config.vision_feature_layer,
        vision_feature_select_strategy="default" if tower.drops_first else "full",
        tie_word_embeddings=own.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    model.generation_config = GenerationConfig.from_dict(own.generation_config.to_dict())
    return replace(source, model=LibraryStudent(model.eval(), family_of("llava")))


def _square_pictures(source: Source) -> Source:
    """The same student with an image processor that makes squares itself, as LLaVA's does."""
    processor, images = source.image_processor, source.encoder.image_encoder
    pads = bool(getattr(processor, "do_pad", False)) and hasattr(processor, "pad_to_square")
    if not isinstance(images, ImageEncoder) or (images.layout == "pad") == pads:
        return source
    made = original_image_processor({"image_aspect_ratio": images.layout}, processor)
    if not processor.to_dict().get("do_center_crop"):
        made = LlavaImageProcessorPil(**{**made.to_dict(), "do_center_crop": False, "crop_size": None})
    encoder = replace(source.encoder, image_encoder=replace(images, processor=made))
    return replace(source, encoder=encoder, image_processor=made)


def _two_layers(source: Source, own: VisionLanguageModel, layout: str) -> tuple[dict[str, Tensor], str]:
    """The projector as two linear layers, and the activation between them."""
    projector = own.model.mm_projector
    width = own.config.text_config.hidden_size
    if isinstance(projector, MlpProjector):
        state = projector.state_dict()
        return _named(*(state[f"{layer}.{part}"] for layer in (0, 2) for part in ("weight", "bias"))), "gelu"
    if not isinstance(projector, TeacherAdapter):
        raise refuse(source, layout, f"its projector {own.config.projector_type!r} pools tokens, and LLaVA's does not")
    if projector.in_grid != projector.out_grid:
        raise refuse(
            source, layout, "it pools the teacher's tokens (pool_teacher_tokens), and LLaVA's projector does not"
        )
    first, second, post = projector.teacher.linear_1, projector.teacher.linear_2, projector.post
    hidden = first.out_features
    if hidden > width:
        raise refuse(
            source,
            layout,
            f"the teacher's projector inside it is {hidden} wide, LLaVA's at most the language model's {width}",
        )
    # Nothing stands between linear_2 and post: they are one layer. Rows of zeros make the first as wide as LLaVA's.
    bias = post.bias.double() + (0 if second.bias is None else post.weight.double() @ second.bias.double())
    merged = (post.weight.double() @ second.weight.double()).float()
    zero = first.weight.new_zeros(hidden) if first.bias is None else first.bias
    pad = width - hidden
    weight = nn.functional.pad(first.weight, (0, 0, 0, pad))
    layers = _named(weight, nn.functional.pad(zero, (0, pad)), nn.functional.pad(merged, (0, pad)), bias.float())
    return layers, str(own.config.teacher_projector["act"])


def _named(*values: Tensor) -> dict[str, Tensor]:
    names = (f"linear_{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias"))
    return {name: value.detach() for name, value in zip(names, values, strict=True)}

"""What LLaVA's original checkpoints have and the library's class does not: ``<image>`` without a token, other projectors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.errors import ModelError


class LlavaOfAnyDepth(LlavaForConditionalGeneration):
    """The library's class with any number of linear layers for a projector (LLaVA-1: one), and without an image token.

    Its code goes with the weights of such a student.

    Args:
        config: The library's; its ``projector_depth``, if it has one, is the number of layers, with a GELU between any two.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        depth = getattr(config, "projector_depth", None)
        if depth not in (None, 2):
            width = config.text_config.hidden_size
            layers: list[nn.Module] = [nn.Linear(config.vision_config.hidden_size, width)]
            for _ in range(depth - 1):
                layers += [nn.GELU(), nn.Linear(width, width)]
            self.model.multi_modal_projector = nn.Sequential(*layers)
        take_image_tokens(self)


def llava_class(projector_depth: int | None) -> type[Any]:
    """The class of a LLaVA by what its configuration says of the projector; None is the library's two layers."""
    return LlavaForConditionalGeneration if projector_depth in (None, 2) else LlavaOfAnyDepth


def take_image_tokens(model: Any) -> None:
    """Let a model take image tokens that its embedding has no row for, as in the original layout.

    There ``<image>`` is no token: the text is cut where it stands, and what is put there is embedded already. Here its place
    is marked by an id beyond the vocabulary, for which row 0 is looked up before the picture takes its place.
    """
    if look_up_row_0(model.get_input_embeddings(), model.config):
        model.loss_function = partial(loss_on_words, model.config.image_token_id, model.loss_function)
        model.model.register_forward_pre_hook(_with_pictures, with_kwargs=True)


def look_up_row_0(embedding: Any, config: Any) -> bool:
    """Let an embedding that has no row for the image token take row 0 for it; whether it has none."""
    beyond: bool = config.image_token_id >= embedding.weight.shape[0]
    if beyond:
        embedding.register_forward_pre_hook(partial(_with_row_0, config))
    return beyond


def image_places(embedding: Any, row: int, embeds: Tensor, mask: Any, past: Any) -> Tensor:
    """Where the embedding of the image token stands, bool ``[B, T]``; padding, which may have the same, left out.

    No place of an image token is missed, so these are its places where they are as many as the images need.

    Args:
        embedding: The model's; takes ids.
        row: Which of its rows is the image token's.
        embeds: float ``[B, T, D]``.
        mask: Of attention, ``[B, past + T]``, or ``[B, 1, T, past + T or more]``, bool or added; others say nothing.
        past: Keys and values of earlier steps, or None.
    """
    token = torch.full((1,), row, device=embeds.device)
    places: Tensor = (embeds == embedding(token).to(embeds.dtype)).all(-1)
    if isinstance(mask, Tensor):
        seen = mask == 0 if mask.dim() == 4 and mask.is_floating_point() else mask.bool()  # what is added, is 0 there
        seen = seen.any(1).any(1) if mask.dim() == 4 else seen  # padding is seen from nowhere
        start = 0 if past is None else int(past.get_seq_length())
        seen = seen[:, start : start + places.shape[1]]
        places = places & seen if seen.shape == places.shape else places
    return places


def put_images(embeds: Tensor, is_image: Tensor, visual: Tensor, remedy: str) -> Tensor:
    """Embeddings ``[B, T, D]`` with those of images ``[M, N, D]`` where ``is_image``; a ModelError if they do not fit."""
    found = int(is_image.sum())
    if found != visual.shape[0] * visual.shape[1]:
        raise ModelError(
            f"the text holds {found} image tokens, expected {visual.shape[0]} images x {visual.shape[1]} visual tokens; {remedy}"
        )
    return embeds.masked_scatter(is_image.unsqueeze(-1), visual.to(embeds.dtype))


AS_IDS = (
    "give input_ids: inputs_embeds tell image tokens from others only where nothing else has the same embedding, padding aside, "
    "which an attention_mask [B, T] tells"
)


def loss_on_words(
    image_token_id: int, loss_function: Callable[..., Tensor], *, labels: Tensor, vocab_size: int, **arguments: Any
) -> Tensor:
    """The library's loss of ``labels``, int64 ``[B, T]``, without those that are no words: pictures, ids beyond the vocabulary."""
    is_word = (labels != image_token_id) & (labels >= 0) & (labels < vocab_size)
    return loss_function(labels=labels.masked_fill(~is_word, -100), vocab_size=vocab_size, **arguments)


def _with_row_0(config: Any, embedding: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    ids, *rest = inputs
    return (ids.masked_fill(ids == config.image_token_id, 0), *rest)


def _with_pictures(
    model: Any, positional: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Embed words and pictures: the image token has no row of its own, in adapters neither, and shares row 0 with padding."""
    ids, embeds, pixels = given.get("input_ids"), given.get("inputs_embeds"), given.get("pixel_values")
    embedding, token = model.get_input_embeddings(), model.config.image_token_id
    has_row = type(embedding) is nn.Embedding and embedding._forward_pre_hooks  # `look_up_row_0`
    if (ids is None) == (embeds is None) or (ids is not None and has_row):
        return positional, given
    images = (given.get("mm_encoder_outputs") or {}).get("image")  # newer versions encode them before they generate
    if images is None and pixels is not None:
        asked = {name: given.get(name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
        images = model.get_image_features(pixels, return_dict=True, **asked)
    if ids is not None:
        places, remedy = ids == token, "give each picture its image tokens, with the first step only"
        embeds = embedding(ids.masked_fill(places, 0))
    elif embeds is not None and images is not None:
        places = image_places(embedding, 0, embeds, given.get("attention_mask"), given.get("past_key_values"))
        remedy = AS_IDS
    if images is not None and embeds is not None:
        embeds = put_images(embeds, places, torch.stack(list(images.pooler_output)).to(embeds.device), remedy)
    others = given.keys() - {"input_ids", "pixel_values", "mm_encoder_outputs"}
    return positional, {name: given[name] for name in others} | {"inputs_embeds": embeds}

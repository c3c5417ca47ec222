"""What LLaVA's original checkpoints have and the library's class does not: ``<image>`` without a token, other projectors."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration


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


def look_up_row_0(embedding: Any, config: Any) -> bool:
    """Let an embedding that has no row for the image token take row 0 for it; whether it has none."""
    beyond: bool = config.image_token_id >= embedding.weight.shape[0]
    if beyond:
        embedding.register_forward_pre_hook(partial(_with_row_0, config))
    return beyond


def loss_on_words(
    image_token_id: int, loss_function: Callable[..., Tensor], *, labels: Tensor, vocab_size: int, **arguments: Any
) -> Tensor:
    """The library's loss of ``labels``, int64 ``[B, T]``, without those that are no words: pictures, ids beyond the vocabulary."""
    is_word = (labels != image_token_id) & (labels >= 0) & (labels < vocab_size)
    return loss_function(labels=labels.masked_fill(~is_word, -100), vocab_size=vocab_size, **arguments)


def _with_row_0(config: Any, embedding: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    ids, *rest = inputs
    return (ids.masked_fill(ids == config.image_token_id, 0), *rest)

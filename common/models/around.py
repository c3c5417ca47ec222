"""Functions around the passes of a model's decoder, which know where the visual tokens stand.

They see the decoder's own arguments, words and pictures embedded already, and call the decoder in their turn, with fewer
tokens or others; who runs others says where the visual ones are among them (``visual_mask``). The outermost was added
last. Wrapped decoders keep their class's name and weights.

Dims: B batch, T tokens of this pass.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., Any]
Wrapper = Callable[..., Any]
"""Called as ``wrapper(run, decoder, **arguments)`` with the decoder's keyword arguments; returns what ``run(**...)`` does."""


class Around:
    """Put in front of a decoder's class, or among the bases of one of ours.

    Attributes:
        wrappers: In the order that they were added.
        visual_mask: Which tokens of this pass are visual, bool ``[B, T]``; None where only embeddings were given.
        places: Where each token of the last pass stood among those that ran, int64 ``[B, T]``, -1 where it did not run; None:
            all ran (`common.models.tokens.fewer_tokens`).
        stands_for: Which token of the last pass ran in the place of each, int64 ``[B, T]``: itself, or the one that it was
            pooled into; -1: none.
        decoded: What a function beside the decoder counted since the last prompt (`common.models.tokens.decoding_tokens`).
    """

    wrappers: tuple[Wrapper, ...] = ()
    visual_mask: Tensor | None = None
    places: Tensor | None = None
    stands_for: Tensor | None = None
    decoded: Any = None

    def run_around(self, run: Run, **arguments: Any) -> Any:
        """Run the decoder inside all wrappers."""
        for wrapper in self.wrappers:
            run = partial(wrapper, run, self)
        return run(**arguments)


class _Decoder(Around):
    """A decoder of the library, whose model has told it where the visual tokens are."""

    def forward(self, input_ids: Tensor | None = None, **arguments: Any) -> Any:
        """As the library's, whose models call it with names."""
        try:
            return self.run_around(super().forward, input_ids=input_ids, **arguments)  # type: ignore[misc]
        finally:
            self.visual_mask = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the library's class, which is found by its name, with this one in front."""
        return remade, (_around, type(self).__bases__[1]), self.__dict__


def remade(make: Callable[[Any], Any], base: Any) -> Any:
    """An empty instance of a class that is made of another."""
    made = make(base)
    return made.__new__(made)


@cache
def _around(decoder_class: Any) -> Any:
    if issubclass(decoder_class, Around):
        return decoder_class
    return type(decoder_class.__name__, (_Decoder, decoder_class), {"__module__": decoder_class.__module__})


def surround(model: Any, parts: Mapping[str, str], wrapper: Wrapper, *, inside: bool = False) -> Any:
    """Put a function around the passes of a model's decoder, and return the decoder.

    Args:
        model: Ours or the library's; ``parts["language_model"]`` is the decoder's path in it.
        inside: Next to the decoder, inside all others: it sees what runs.
    """
    decoder = model.get_submodule(parts["language_model"])
    if not isinstance(decoder, Around):
        decoder_class: Any = type(decoder)
        decoder.__class__ = _around(decoder_class)
        inner = reader_of(model)
        (model if inner is decoder else inner).register_forward_pre_hook(partial(_tell, decoder), with_kwargs=True)
    decoder.wrappers = (wrapper, *decoder.wrappers) if inside else (*decoder.wrappers, wrapper)
    return decoder


def reader_of(model: Any) -> Any:
    """The part of a model that reads ids and pictures.

    It runs with its hooks however the model is called: losses on chunks of logits call this part alone, and who calls the
    model's ``forward`` passes the model's own hooks by.
    """
    return getattr(model, "model", model)


def by_name(module: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pass by name, those too that were given by place."""
    return (
        dict(zip(signature(module.forward).parameters, inputs, strict=False)) | dict(named) if inputs else dict(named)
    )


def _tell(decoder: Any, model: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    ids = by_name(model, inputs, named).get("input_ids")
    config = model.config
    # Frames of a video have an id of their own in some families.
    kinds = {getattr(config, name, None) for name in ("image_token_id", "video_token_id", "video_token_index")} - {None}
    decoder.visual_mask = None if ids is None else torch.isin(ids, torch.tensor(sorted(kinds), device=ids.device))

"""Record hidden states of chosen layers and positions, while the model runs as usual.

Hooks on the decoder's layers keep the wanted rows only, so ``output_hidden_states`` and its L + 1 whole copies are
never needed. A teacher (no grad) and a student (with grad) use the same code.

**Layers are counted as the model library counts hidden states**: 0 is what enters the first layer (at visual
tokens: the projector's output as the language model reads it), i the output of layer i, and the last one, equal to the
depth, comes after the final norm.

Dims: B batch, R requested rows, S recorded layers, D width.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_distill_cache.common.attention.capture import checkpoints_activations, renumber
from vlm_distill_cache.common.errors import ModelError

KEPT_LAYERS = "kept_layers"
"""A key of the language model's configuration, where it was cut out of a deeper one."""


@dataclass(frozen=True)
class HiddenRequest:
    """Which rows and layers to record.

    Attributes:
        rows: int64 ``[B, R]``, positions in this forward pass; -1 is padding.
        layers: Hidden states, 0 to the depth, each once.
    """

    rows: Tensor
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.dtype != torch.int64:
            raise ModelError(
                f"hidden states: `rows` must be int64 [batch, positions], got {self.rows.dtype} {list(self.rows.shape)}"
            )
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ModelError(f"hidden states: expected distinct layers, got {self.layers}")


class HiddenCapture:
    """Records hidden states of one language model: a decoder with ``layers`` and a final ``norm``, else a ModelError."""

    def __init__(self, language_model: Any) -> None:
        layers, norm = getattr(language_model, "layers", None), getattr(language_model, "norm", None)
        if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
            raise ModelError(
                f"{type(language_model).__name__} has no `layers` and `norm` of its own: its hidden states cannot "
                "be recorded, only its logits"
            )
        self._model, self._layers, self._norm = language_model, layers, norm
        self.depth = len(layers)

    @contextmanager
    def record(self, requests: Mapping[str, HiddenRequest]) -> Iterator[dict[str, Tensor]]:
        """Record what is requested, by any names, of the one forward pass run inside the block.

        Yields:
            By name, filled when the block ends without error: ``[B, R, S, D]`` in the model's dtype, padding
            rows 0, with a gradient if the forward pass had one.

        Raises:
            ModelError: If a layer does not exist, the library's gradient checkpointing is on, or no forward pass was
                run.
        """
        wanted = sorted({layer for request in requests.values() for layer in request.layers})
        unknown = [layer for layer in wanted if not 0 <= layer <= self.depth]
        if unknown:
            raise ModelError(
                f"hidden states {unknown} do not exist: the language model has {self.depth} layers (0, its input, "
                f"to {self.depth}, its normalised output); change hidden_layers"
            )
        if checkpoints_activations(self._model.modules()):
            raise ModelError(
                "hidden states cannot be recorded while the library's gradient checkpointing is on: turn it off and use "
                "the run's own (gradient_checkpointing=true), or train without losses on hidden states"
            )
        seen: dict[int, Tensor] = {}
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for layer in wanted:
                hooks.callback(self._hook(layer, seen).remove)
            yield found
        if missing := [layer for layer in wanted if layer not in seen]:
            raise ModelError(f"hidden states {missing} were not seen: run the model once inside record()")
        places = getattr(self._model, "places", None)
        for name, request in requests.items():
            last = seen[max(request.layers)].device  # of a model on several none waits for what comes behind it
            states = [seen[layer].to(last) for layer in request.layers]
            rows = request.rows if places is None else renumber(request.rows, places)
            found[name] = gather_rows(torch.stack(states, dim=2), rows)  # of [B, T, S, D]

    def _hook(self, layer: int, seen: dict[int, Tensor]) -> Any:
        if layer == 0:
            return self._layers[0].register_forward_pre_hook(partial(_keep_input, seen), with_kwargs=True)
        module = self._norm if layer == self.depth else self._layers[layer - 1]
        return module.register_forward_hook(partial(_keep_output, seen, layer))


def _keep_input(seen: dict[int, Tensor], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _keep(seen, 0, args[0] if args else kwargs["hidden_states"])


def _keep_output(seen: dict[int, Tensor], layer: int, _: nn.Module, __: Any, output: Any) -> None:
    _keep(seen, layer, output[0] if isinstance(output, tuple) else output)


def _keep(seen: dict[int, Tensor], layer: int, states: Tensor) -> None:
    if layer in seen:
        raise ModelError("the language model ran twice inside one record() block: open a new block for each pass")
    seen[layer] = states


def gather_rows(states: Tensor, rows: Tensor) -> Tensor:
    """Pick positions of each sample, int64 ``[B, R]``, of ``[B, T, ...]``: ``[B, R, ...]``; at -1, padding, 0."""
    rows = rows.to(states.device)
    batch = torch.arange(len(rows), device=states.device)[:, None]
    mask = (rows >= 0).view(*rows.shape, *[1] * (states.ndim - 2))
    return states[batch, rows.clamp_min(0)] * mask


def student_layers(
    layers: tuple[int, ...], *, teacher_depth: int, student_depth: int, kept: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """The student's hidden states that meet the teacher's; first and last meet first and last.

    As many as the teacher's ``layers``; of a shallow student one may meet several.

    Args:
        kept: Which of the teacher's layers are the student's own, if it was cut out of the teacher: a state then meets the
            one behind the same layers. None: the one at the same share of the depth.
    """
    if kept is None:
        return tuple((2 * layer * student_depth + teacher_depth) // (2 * teacher_depth) for layer in layers)
    # The student's last state comes after the final norm, as the teacher's last alone does.
    return tuple(
        student_depth if layer == teacher_depth else min(sum(own < layer for own in kept), student_depth - 1)
        for layer in layers
    )


def kept_layers(text_config: Any, *, teacher_depth: int) -> tuple[int, ...] | None:
    """Which layers of a teacher of this depth a language model kept when it was cut out of it; None: unknown.

    Raises:
        ModelError: If the configuration names layers that cannot be its own.
    """
    told, depth = getattr(text_config, KEPT_LAYERS, None), int(text_config.num_hidden_layers)
    found = None
    while told is not None:
        of, kept = (told.get("of"), told.get("kept")) if isinstance(told, Mapping) else (None, None)
        own = kept if isinstance(kept, list) and all(type(layer) is int for layer in kept) else []
        if type(of) is not int or len(own) != depth or own != sorted(set(own)) or own[0] < 0 or own[-1] >= of:
            raise ModelError(
                f"config.json: {KEPT_LAYERS} is {str(told)[:80]!r}; expected the depth `of` the teacher and the {depth} layers "
                "`kept` of it, ascending; use the config.json of the checkpoint"
            )
        if found is None and of == teacher_depth:
            found = tuple(own)
        told = told.get("before")  # of a teacher that was cut out of a deeper one
    return found

"""How much each attention head, MLP channel and whole layer of a language model matters, measured on samples.

*Activation* (heads and channels): the mean, over all positions, of the square of what a part adds to the residual
stream: exactly what the layer's output would change by without it. Inputs and weights both count, and no gradient is
needed. *Taylor* (both, and layers): the sum of ``|w * dL/dw|`` over a part's weights, where L is the mean
cross-entropy of the supervised rows: to first order, what the loss may change by without them. A head is its rows of
queries and its columns of the output, a key-value head its rows of keys and values, a channel its rows of gate and up
and its column of down, a layer all of these. *Influence* (layers): ``1 - cos(x_in, x_out)``, a mean over all
positions, of what enters a layer and what enters the next one.

Dims: L layers, H query heads, K key-value heads, d width of a head, C channels, D width of the model, T sequence.

Source:
    Huang et al. 2026 (arXiv:2604.24380), whose code is LLM-Pruner's (arXiv:2305.11627, ``param_first``: absolute values
    of single weights) and ShortGPT's (arXiv:2403.03853, block influence). Activation is ours.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import DataError, ModelError
from vlm_distill_cache.data.families.models import row_logits
from vlm_distill_cache.stage2_student.prune.plan import Importance
from vlm_distill_cache.stage2_student.pruned_folder import DepthImportance, WidthImportance
from vlm_distill_cache.stage2_student.students.prunable import ATTENTION, MLP, prunable_layers


class Measured(NamedTuple):
    """A sample to measure on: keyword arguments of one forward pass, without padding, and labels int64 ``[1, T]``."""

    inputs: Mapping[str, Any]
    labels: Tensor


class _Activation:
    """Sums of one decoder layer: of products of a head's outputs ``[H, d, d]``, of squares of channels ``[C]``."""

    def __init__(self, layer: Any, heads: int) -> None:
        self.output: nn.Linear = layer.self_attn.o_proj
        self.down: nn.Linear = layer.mlp.down_proj
        self.heads = heads
        width = self.output.in_features // heads
        device = self.output.weight.device
        self.products = torch.zeros(heads, width, width, device=device)
        self.squares = torch.zeros(self.down.in_features, device=device)
        self.rows = 0

    def see_heads(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add what enters the attention's output projection."""
        rows = inputs[0].detach().float().reshape(-1, self.heads, self.products.shape[1])  # [T, H, d]
        self.products += torch.einsum("thd,the->hde", rows, rows)
        self.rows += rows.shape[0]

    def see_channels(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add what enters the MLP's output projection."""
        self.squares += inputs[0].detach().float().reshape(-1, self.down.in_features).square().sum(0)

    def head_importance(self) -> Tensor:
        """Mean of ``|W_h a_h|^2``, float32 ``[H]``."""
        weight = self.output.weight.detach().float()  # [D, H * d]
        by_head = weight.reshape(weight.shape[0], self.heads, -1).transpose(0, 1)  # [H, D, d]
        inner = by_head.transpose(1, 2) @ by_head  # [H, d, d]
        return (inner * self.products).sum((1, 2)).cpu() / self.rows

    def channel_importance(self) -> Tensor:
        """Mean of ``|W_c x_c|^2``, float32 ``[C]``."""
        return (self.squares * self.down.weight.detach().float().square().sum(0)).cpu() / self.rows


class _Influence:
    """Sums over rows of the cosine between what enters each layer and what enters the next one."""

    def __init__(self, layers: list[nn.Module], hooks: ExitStack) -> None:
        self.cosines = torch.zeros(len(layers), dtype=torch.float64)
        self._before = torch.zeros(0)
        for index, layer in enumerate(layers):
            enters = layer.register_forward_pre_hook(
                lambda _layer, inputs, named, index=index: self._see(index, (*inputs, *named.values())[0]),
                with_kwargs=True,
            )
            hooks.callback(enters.remove)
        leaves = layers[-1].register_forward_hook(
            lambda _layer, _inputs, output: self._see(len(layers), output[0] if isinstance(output, tuple) else output)
        )
        hooks.callback(leaves.remove)

    def _see(self, index: int, states: Tensor) -> None:
        states = states.detach().float()
        if index:
            same = F.cosine_similarity(self._before.to(states.device), states, dim=-1)
            self.cosines[index - 1] += same.double().sum().cpu()
        self._before = states


class _Gradients:
    """The loss's gradients by the weights and biases that leave with a part, summed over samples, in float32."""

    def __init__(self, model: Any, layers: list[Any], hooks: ExitStack) -> None:
        self.layers = layers
        self.rows = 0
        self.sums: dict[Any, Tensor] = {}
        before = {parameter: parameter.requires_grad for parameter in model.parameters()}

        def restore() -> None:
            for parameter, wanted in before.items():
                parameter.requires_grad_(wanted)
                parameter.grad = None

        hooks.callback(restore)
        model.requires_grad_(False)
        for layer in layers:
            for linear in _linears(layer).values():
                for value in (linear.weight, linear.bias):
                    if value is not None:
                        self.sums[value.requires_grad_(True)] = torch.zeros(0)

    def see(self, model: Any, batch: Measured) -> None:
        """Add the gradient of one sample's summed cross-entropy; one without supervised rows adds nothing."""
        rows = batch.labels != IGNORE_INDEX
        if not rows.any():
            return
        logits = row_logits(model, batch.inputs, rows)  # [A, V]
        F.cross_entropy(logits.float(), batch.labels[rows].to(logits.device), reduction="sum").backward()
        self.rows += int(rows.sum())
        for value, total in self.sums.items():
            # Many samples' gradients would not fit into bfloat16.
            if value.grad is not None:
                self.sums[value] = value.grad.float() if not len(total) else total + value.grad.float()
            value.grad = None

    def of(self, linear: nn.Linear, *, columns: bool = False) -> Tensor:
        """``|w * dL/dw|`` summed over each row, its bias among them, or each column, float32; L is a mean over rows."""
        weight, bias = linear.weight, linear.bias
        found = self._of(weight).sum(0 if columns else 1)
        return found if columns or bias is None else found + self._of(bias)

    def _of(self, value: Tensor) -> Tensor:
        total = self.sums[value]
        return (value.detach().float() * total).abs().cpu() / self.rows if len(total) else torch.zeros(value.shape)

    def importance(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of heads ``[L, H]``, of key-value heads ``[L, K]`` and of channels ``[L, C]``."""
        found = []
        for layer in self.layers:
            part = _linears(layer)
            width = part["o_proj"].in_features // heads
            query = self.of(part["q_proj"]) + self.of(part["o_proj"], columns=True)
            served = self.of(part["k_proj"]) + self.of(part["v_proj"])
            channels = self.of(part["gate_proj"]) + self.of(part["up_proj"]) + self.of(part["down_proj"], columns=True)
            found.append((query.view(-1, width).sum(1), served.view(-1, width).sum(1), channels))
        of_heads, of_served, of_channels = (torch.stack(kind) for kind in zip(*found, strict=True))
        return of_heads, of_served, of_channels


def measure_importance(
    model: Any,
    language_model: Any,
    batches: Iterable[Measured],
    *,
    heads: int,
    width: WidthImportance = "activation",
    depth: DepthImportance | None = None,
) -> Importance:
    """Run a model over samples and see what each head, channel and layer matters; one pass over the samples does all.

    The model is in evaluation mode. Samples are run one by one: padding would count as rows.

    Args:
        heads: Query heads of each layer.
        width: What heads and channels are measured by.
        depth: What layers are measured by; None: they are not, and come out as zeros.

    Raises:
        ModelError: If the decoder's layers are built in another way, or what it computes is not finite.
        DataError: If there is no sample, or, for ``taylor``, none with an answer.
    """
    layers = prunable_layers(language_model)
    seen = [_Activation(layer, heads) for layer in layers]
    influence = gradients = None
    by_loss = "taylor" in (width, depth)
    with ExitStack() as hooks:
        for layer in seen:
            hooks.enter_context(layer.output.register_forward_pre_hook(layer.see_heads))
            hooks.enter_context(layer.down.register_forward_pre_hook(layer.see_channels))
        if depth == "influence":
            influence = _Influence(layers, hooks)
        if by_loss:
            gradients = _Gradients(model, layers, hooks)
        with torch.enable_grad() if by_loss else nullcontext():
            _run(model, batches, gradients)
        if gradients is not None and not gradients.rows:
            raise DataError("no sample with an answer to measure importance=taylor on; give data with answers")
        if not seen[0].rows:
            raise DataError("no sample to measure the importance of heads and channels on; give more data")
        of_heads = torch.stack([layer.head_importance() for layer in seen])
        of_channels = torch.stack([layer.channel_importance() for layer in seen])
        served = layers[0].self_attn.k_proj.out_features // (layers[0].self_attn.o_proj.in_features // heads)  # type: ignore[union-attr, operator]
        of_served = torch.zeros(len(layers), int(served))
        of_layers = torch.zeros(len(layers))
        if influence is not None:
            of_layers = 1 - (influence.cosines / seen[0].rows).float()
        if gradients is not None:
            by_taylor = gradients.importance(heads)
            if width == "taylor":
                of_heads, of_served, of_channels = by_taylor
            if depth == "taylor":
                of_layers = torch.stack([kind.sum(1) for kind in by_taylor]).sum(0)
    measured = {"heads": of_heads, "heads of keys and values": of_served, "channels": of_channels, "layers": of_layers}
    _refuse_infinite(measured, next(iter(model.parameters())).dtype)
    return Importance(heads=of_heads, key_values=of_served, channels=of_channels, layers=of_layers, rows=seen[0].rows)


def _refuse_infinite(measured: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse to rank by numbers of which some are none: what was beyond a precision's range would stay or leave by chance."""
    name = str(dtype).removeprefix("torch.")
    remedy = (
        "store it in bfloat16 or float32 (save_pretrained of the library)"
        if name == "float16"
        else "look at its weights"
    )
    for of, values in measured.items():
        if not values.isfinite().all():
            raise ModelError(
                f"the importance of {of} cannot be measured: in the {name} that the teacher is stored in, it computes numbers "
                f"that are not finite; {remedy}"
            )


def _run(model: Any, batches: Iterable[Measured], gradients: _Gradients | None) -> None:
    for batch in batches:
        if gradients is None:
            with torch.no_grad():
                model(**batch.inputs, use_cache=False)
        else:
            gradients.see(model, batch)


def _linears(layer: Any) -> dict[str, nn.Linear]:
    """The projections of a layer by name."""
    return {name: getattr(layer.self_attn if name in ATTENTION else layer.mlp, name) for name in (*ATTENTION, *MLP)}

"""Record where chosen rows look, while the model itself runs plain SDPA.

One attention function **and one mask function under the same name** go into the model library's
interfaces; registering only the first would silently drop the causal mask. The output comes from the
library's own SDPA function (`capped_attention` where scores are squeezed), so logits are bit-identical. Beside
it, and only for the wanted layers and rows, :mod:`common.attention.rows` computes the attention again in float32
and bounded memory. A teacher (no grad) and a student (with grad) use the same code.
`make bench` measures what that costs beside plain SDPA, and eager attention with `output_attentions` beside that.

Dims: B batch, R requested rows, M requested keys, G layer groups.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from vlm_distill_cache.common.attention.rows import SharedPlace, head_mean_attention
from vlm_distill_cache.common.errors import ModelError


def capped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Run the eager attention of the module's own family; all its scores exist at once, ``[B, H, Tq, Tk]``.

    Takes and returns what the library's attention functions do. The mask is as SDPA takes it: bool (True = may look),
    float (added to scores), or None; ``is_causal`` counts where there is none.

    Raises:
        ModelError: If the family has no eager attention.
    """
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ModelError(
            f"{type(module).__name__} passes `softcap` to attention, which SDPA cannot apply, and its family has no "
            "eager attention in the installed transformers; this model cannot be used"
        )
    if _is_causal(module, is_causal, attention_mask, query):
        rows, columns = (torch.arange(tensor.shape[2], device=query.device) for tensor in (query, key))
        attention_mask = (rows[:, None] >= columns[None, :])[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # eager attention adds its mask
        zeros = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
        attention_mask = zeros.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    output: tuple[Tensor, Any] = eager(module, query, key, value, attention_mask, **kwargs)
    return output


def _is_causal(module: nn.Module, is_causal: bool | None, mask: Tensor | None, query: Tensor) -> bool:
    """Whether queries see no later keys, as SDPA decides it: without a mask, and for more than one query.

    A vision tower or an encoder says False on its module.
    """
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    return causal and mask is None and query.shape[2] > 1


@dataclass(frozen=True)
class AttentionRequest:
    """Which rows, keys and layers to record.

    Attributes:
        rows: int64 ``[B, R]``, query positions in this forward pass; -1 is padding.
        keys: int64 ``[B, M]``, key positions; -1 is padding.
        groups: Language-model layer indices (0-based) of each of G groups; groups may share layers.
        row_weights: Float ``[B, R]``: record the sum of the rows, each times its weight, not the rows; ``[B, V, R]``: V
            such sums, without a gradient. None: the rows.
            Where the same tensors of rows and keys were requested before without weights, the sum is taken of those.
    """

    rows: Tensor
    keys: Tensor
    groups: tuple[tuple[int, ...], ...]
    row_weights: Tensor | None = None

    def __post_init__(self) -> None:
        for name, positions in (("rows", self.rows), ("keys", self.keys)):
            if positions.ndim != 2 or positions.dtype != torch.int64:
                raise ModelError(
                    f"attention request: `{name}` must be int64 [batch, positions], "
                    f"got {positions.dtype} {list(positions.shape)}"
                )
            if positions.numel() and int(positions.min()) < -1:
                raise ModelError(
                    f"attention request: `{name}` holds position {int(positions.min())}; "
                    "positions are 0 or more, and -1 is padding"
                )
        if self.rows.shape[0] != self.keys.shape[0]:
            raise ModelError(
                f"attention request: `rows` are for {self.rows.shape[0]} samples "
                f"but `keys` for {self.keys.shape[0]}; build both from one batch"
            )
        weights = self.row_weights
        if weights is not None and (weights.shape[::2] if weights.ndim == 3 else weights.shape) != self.rows.shape:
            raise ModelError(
                f"attention request: `row_weights` {list(weights.shape)} must have the shape of `rows`, "
                f"{list(self.rows.shape)}"
            )
        if not self.groups or any(not group or len(set(group)) != len(group) for group in self.groups):
            raise ModelError(f"attention request: `groups` must be tuples of distinct layer indices, got {self.groups}")

    @property
    def layers(self) -> frozenset[int]:
        """All layers that any group needs."""
        return frozenset(layer for group in self.groups for layer in group)

    @cached_property
    def largest(self) -> tuple[int, int]:
        """Largest row and key position: read once, because each read waits for a GPU."""
        return tuple(int(t.max()) if t.numel() else -1 for t in (self.rows, self.keys))  # type: ignore[return-value]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows, keys and weights on a device: copied once, and kept once for all layers."""
        if device not in self._copies:
            with torch.inference_mode(False):  # a later pass, with gradients, may save them
                self._copies[device] = (
                    self.rows.to(device),
                    self.keys.to(device),
                    None if self.row_weights is None else self.row_weights.to(device),
                )
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, Tensor, Tensor | None]]:
        return {}

    def check_fits(self, *, batch: int, queries: int, keys: int) -> None:
        """Raise ModelError unless all positions lie inside the batch that the model runs."""
        if self.rows.shape[0] != batch:
            raise ModelError(
                f"attention request is for {self.rows.shape[0]} samples, but the model runs {batch}; "
                "build the request from the same batch"
            )
        for name, largest, limit in zip(("rows", "keys"), self.largest, (queries, keys), strict=True):
            if largest >= limit:
                raise ModelError(
                    f"attention request: `{name}` holds position {largest}, but the sequence has {limit} "
                    "positions; build the request from the padded batch that the model runs"
                )


IMPLEMENTATION = "captured"  # "sdpa" in the name would have the library refuse models with squeezed scores
# Arguments that change the attention weights and that the recomputation does not know.
_UNSUPPORTED = ("position_bias", "s_aux", "cache")

_recorders: WeakKeyDictionary[nn.Module, "_Recorder"] = WeakKeyDictionary()
_recorders_lock = threading.Lock()
_repeated = threading.local()  # recorders of the pass that a checkpointed layer repeats in this thread
_watching = threading.local()  # what `watch` shows layers to in this thread
_WATCHED = f"watched by {__name__}"  # of this code: copies of it lie beside students
Watcher = Callable[..., None]
"""Called as attention functions are: ``watcher(module, query, key, attention_mask, causal=, scaling=, softcap=)``."""


class AttentionMaps(Mapping[str, Tensor]):
    """Recorded attention by request name: float32 ``[B, G, R, M]``, complete after the forward pass; R is 1 for a sum of rows.

    Each value is the probability mass of a row (softmax over **all** keys it may see) on the requested
    keys; mean over heads, then over the layers of the group. Padding rows and keys are 0, and so are
    rows whose mask lets them see nothing. Taken before attention dropout. Carries a gradient if the
    forward pass did.
    """

    def __init__(self, requests: Mapping[str, AttentionRequest]) -> None:
        self._requests = dict(requests)
        self._sums: dict[str, list[Tensor | None]] = {n: [None] * len(r.groups) for n, r in requests.items()}
        self._pending = {name: set(request.layers) for name, request in requests.items()}
        self._stacked: dict[str, Tensor] = {}
        self._last: dict[str, torch.device] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[str]:
        return iter(self._requests)

    def __getitem__(self, name: str) -> Tensor:
        if self._pending[name]:
            raise ModelError(
                f"request {name!r}: no attention recorded for layers {sorted(self._pending[name])}; run the "
                "model once inside `with capture.record(...)` (if it did run, its family does not compute "
                "attention through the model library's attention interface)"
            )
        if name not in self._stacked:
            totals = [total for total in self._sums.pop(name) if total is not None]
            self._stacked[name] = torch.stack([total.to(self._last[name]) for total in totals], dim=1)
        return self._stacked[name]

    def add(self, name: str, layer: int, attention: Tensor) -> None:
        """Add one layer's head mean, float32 ``[B, R, M]``, to every group that holds the layer; once."""
        if layer not in self._pending[name]:
            raise ModelError(
                f"layer {layer} was run twice inside one record() block: it covers exactly one forward pass; "
                "open a new block for each, and call generate() outside of it"
            )
        self._pending[name].discard(layer)
        sums = self._sums[name]
        for index, group in enumerate(self._requests[name].groups):
            if layer in group:
                total, part = sums[index], attention / len(group)
                # Layers of a model that is spread over devices give maps on several: none waits for what comes behind it.
                sums[index] = part if total is None else total.to(part.device) + part
        self._last[name] = attention.device

    def check_complete(self) -> None:
        """Raise ModelError if any request lacks a layer."""
        for name in self._requests:
            self[name]


class AttentionCapture:
    """Records attention of one language model; outside :meth:`record` the model runs exactly as with SDPA.

    Only the language model's configuration changes. A vision tower keeps its own implementation: it has
    layer indices too, and needs no rows recorded.

    Args:
        language_model: The decoder of a vision-language model, or a causal language model of its own.
        chunk_rows: Rows computed at a time; by default as many as :mod:`common.attention.rows` finds best.

    Raises:
        ModelError: If the model holds a vision tower, does not use the attention interface, or its layers have no index.
    """

    def __init__(self, language_model: Any, *, chunk_rows: int | None = None) -> None:
        config = language_model.config
        name = type(language_model).__name__
        if getattr(config, "vision_config", None) is not None:
            raise ModelError(
                f"attention capture got {name}, which holds a vision tower: pass its language model alone "
                "(for LLaVA: model.model.language_model), or the tower would be captured as well"
            )
        if chunk_rows is not None and chunk_rows < 1:
            raise ModelError(f"chunk_rows must be at least 1 row, got {chunk_rows}")
        squeezes = getattr(config, "attn_logit_softcapping", None) is not None
        if not getattr(language_model, "_supports_sdpa", True) and not squeezes:
            raise ModelError(
                f"{name} does not support SDPA in the installed transformers, so something in its attention would be "
                "lost: only its logits can be cached"
            )
        register_capture()
        language_model.set_attn_implementation(IMPLEMENTATION)
        if config._attn_implementation != IMPLEMENTATION:
            raise ModelError(
                f"{name} does not take its attention from the model library's attention interface "
                f"(it stays on {config._attn_implementation!r}): only its logits can be cached"
            )
        self.depth: int = int(config.num_hidden_layers)
        self._decoder = language_model
        self._checkpointed = [m for m in language_model.modules() if hasattr(m, "gradient_checkpointing")]
        self._modules = [m for m in language_model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        missing = set(range(self.depth)) - {int(module.layer_idx) for module in self._modules}
        if missing:
            raise ModelError(
                f"{name} has {self.depth} layers, but no attention module carries the index "
                f"{sorted(missing)} (`layer_idx`): its attention cannot be captured, only its logits"
            )
        self._chunk_rows = chunk_rows

    @contextmanager
    def record(self, requests: Mapping[str, AttentionRequest]) -> Iterator[AttentionMaps]:
        """Record what is requested, by any names, of the one forward pass run inside the block.

        Yields:
            The maps, readable once the forward pass is done, and after the block.

        Raises:
            ModelError: If a layer does not exist, another record() is active on this model, gradient
                checkpointing is on, or the block ends without error but without a forward pass.
        """
        for name, request in requests.items():
            unknown = sorted(layer for layer in request.layers if not 0 <= layer < self.depth)
            if unknown:
                raise ModelError(
                    f"request {name!r} names layers {unknown}, but the language model has {self.depth} "
                    f"layers (0 to {self.depth - 1}); choose layers for this depth"
                )
        if checkpoints_activations(self._checkpointed):
            raise ModelError(
                "attention cannot be recorded while the library's gradient checkpointing is on: turn it off for the "
                "language model and use the run's own (gradient_checkpointing=true), or train without attention losses"
            )
        maps = AttentionMaps(requests)
        places = {name: SharedPlace() for name in requests}
        recorder = _Recorder(
            requests=dict(requests), maps=maps, chunk_rows=self._chunk_rows, places=places, decoder=self._decoder
        )
        with _recorders_lock:
            if any(module in _recorders for module in self._modules):
                raise ModelError(
                    "record() is already active on this language model: blocks cannot be nested or run from "
                    "two threads; put all requests into one record() call"
                )
            _recorders.update((module, recorder) for module in self._modules)
        try:
            yield maps
        finally:
            with _recorders_lock:
                for module in self._modules:
                    _recorders.pop(module, None)
        maps.check_complete()


@dataclass(frozen=True)
class _Recorder:
    """What one active record() block wants from the attention function."""

    requests: dict[str, AttentionRequest]
    maps: AttentionMaps
    chunk_rows: int | None
    places: Mapping[str, SharedPlace]
    decoder: Any
    ran: dict[str, AttentionRequest] = field(default_factory=dict)

    def _of_what_ran(self, name: str, request: AttentionRequest, *, batch: int) -> AttentionRequest:
        """A request in positions of what runs of the sequence; found in the pass's first layer, so that a repeat has it."""
        if name not in self.ran:
            places = getattr(self.decoder, "places", None)
            if places is not None:
                request.check_fits(batch=batch, queries=places.shape[1], keys=places.shape[1])
                moved = {id(tensor): renumber(tensor, places) for tensor in (request.rows, request.keys)}
                for other in self.requests:
                    if other in self.ran:  # rows and keys that two requests share stay shared
                        old, new = self.requests[other], self.ran[other]
                        moved |= {id(old.rows): new.rows, id(old.keys): new.keys}
                request = replace(request, rows=moved[id(request.rows)], keys=moved[id(request.keys)])
            self.ran[name] = request
        return self.ran[name]

    def observe(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        *,
        attention_mask: Tensor | None,
        scaling: float | None,
        is_causal: bool | None,
        softcap: float | None = None,
        repeated: bool = False,
    ) -> None:
        """Compute this layer's part of every request that wants it, and add it unless it was added before."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        wanted = {name: request for name, request in self.requests.items() if layer in request.layers}
        causal = _is_causal(module, is_causal, attention_mask, query)
        whole: dict[tuple[int, int], Tensor] = {}  # rows recorded, by where they were asked for
        for name, asked_for in wanted.items():
            request = self._of_what_ran(name, asked_for, batch=query.shape[0])
            request.check_fits(batch=query.shape[0], queries=query.shape[2], keys=key.shape[2])
            rows, keys, row_weights = request.on(query.device)
            asked = id(request.rows), id(request.keys)
            if row_weights is not None and asked in whole:
                # No matrix product, which autocast would round.
                sums = (row_weights if row_weights.ndim == 3 else row_weights[:, None]).unbind(dim=1)
                attention = torch.stack([(one[:, :, None] * whole[asked]).sum(dim=1) for one in sums], dim=1)
            else:
                attention = head_mean_attention(
                    query,
                    key,
                    rows=rows,
                    keys=keys,
                    row_weights=row_weights,
                    attention_mask=attention_mask,
                    causal=causal,
                    scaling=scaling,
                    softcap=softcap,
                    chunk_rows=self.chunk_rows,
                    last_row=request.largest[0],
                    shared=self.places[name],
                )
                if row_weights is None:
                    whole[asked] = attention
            if not repeated:
                self.maps.add(name, layer, attention)


def renumber(positions: Tensor, places: Tensor) -> Tensor:
    """Positions in a sequence as those in what ran of it; padding where they did not.

    Args:
        positions: int64 ``[B, R]``, -1 is padding.
        places: Of each token of the sequence among those that ran, int64 ``[B, T]``, -1: it did not.
    """
    found = places.to(positions.device).gather(1, positions.clamp_min(0))
    return found.masked_fill(positions < 0, -1)


def checkpoint_recorded(function: Callable[..., Any], *inputs: Any) -> Any:
    """Run a decoder layer and forget its activations, recorded attention's too; the backward pass runs it again.

    To be set as a decoder layer's ``_gradient_checkpointing_func``. torch wants the second run to repeat every
    operation of the first, recording included, so that is what the second run does, adding to no map.
    """
    with _recorders_lock:
        recorders = dict(_recorders)
    runs = 0

    def run(*arguments: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 1:
            return function(*arguments)
        _repeated.recorders = recorders
        try:
            return function(*arguments)
        finally:
            _repeated.recorders = {}

    return checkpoint(run, *inputs, use_reentrant=False)


def checkpoints_activations(modules: Iterable[nn.Module]) -> bool:
    """Whether modules in training checkpoint layers in the library's way, whose second run records nothing."""
    return any(
        getattr(module, "gradient_checkpointing", False)
        and module.training
        and getattr(module, "_gradient_checkpointing_func", None) is not checkpoint_recorded
        for module in modules
    )


@contextmanager
def watch(language_model: Any, layers: Iterable[int], watcher: Watcher) -> Iterator[None]:
    """Show queries and keys of some layers to a function, as attention gets them, in the one pass run inside the block.

    `AttentionCapture` may be on or off, and record; the model's output stays bit-identical.

    Args:
        language_model: A decoder with ``layers``, on the library's SDPA or captured.
        layers: Their indices, each once.
        watcher: Must not change what it is shown.

    Raises:
        ModelError: If the model runs another attention than SDPA, is watched already, or a layer was not seen once.
    """
    modules = [attention_module(language_model, layer) for layer in layers]
    configs = {id(module.config): module.config for module in modules}
    before, name = {key: config._attn_implementation for key, config in configs.items()}, type(language_model).__name__
    if _WATCHED in before.values():
        raise ModelError(
            f"{name} is run by two threads at once while its attention is watched: run one after the other"
        )
    if other := sorted({str(one) for one in before.values()} - {"sdpa", IMPLEMENTATION}):
        raise ModelError(
            f"{name} runs attention {other[0]!r}, in which queries and keys cannot be seen; expected 'sdpa': call "
            "model.set_attn_implementation('sdpa'), or open it with attn_implementation='sdpa'"
        )
    AttentionInterface.register(_WATCHED, _watched_attention)
    AttentionMaskInterface.register(_WATCHED, AttentionMaskInterface()["sdpa"])
    seen: list[nn.Module] = []
    _watching.now = before, dict.fromkeys(modules, watcher), seen
    try:
        for config in configs.values():
            config._attn_implementation = _WATCHED
        yield
    finally:
        del _watching.now
        for key, config in configs.items():
            config._attn_implementation = before[key]
    if len(seen) != len(modules) or set(seen) != set(modules):
        raise ModelError(
            f"{name}: attention was seen {len(seen)} times, expected once in each of the layers {[*layers]}: it does not go "
            "through the model library's attention interface"
        )


def _watched_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """The attention that the module would run, after showing a watched one's queries and keys."""
    before, watchers, seen = _watching.now
    if module in watchers:
        causal = _is_causal(module, kwargs.get("is_causal"), mask, query)
        watchers[module](
            module, query, key, mask, causal=causal, scaling=kwargs.get("scaling"), softcap=kwargs.get("softcap")
        )
        seen.append(module)
    return AttentionInterface()[before[id(module.config)]](module, query, key, value, mask, **kwargs)


def attention_module(language_model: Any, layer: int) -> Any:
    """The attention of a decoder's layer; a ModelError where it has none, or it carries no index."""
    for module in language_model.layers[layer].modules():
        if getattr(module, "layer_idx", None) == layer and hasattr(module, "config") and hasattr(module, "scaling"):
            return module
    raise ModelError(
        f"{type(language_model).__name__}: layer {layer} has no attention with an index (`layer_idx`), so what it looks at "
        "cannot be seen"
    )


def is_recorded(module: nn.Module) -> bool:
    """Whether a `record` block of `AttentionCapture` is active for an attention module."""
    return module in _recorders


def register_capture() -> None:
    """Put the attention function and its mask function into the model library's interfaces, once."""
    AttentionInterface.register(IMPLEMENTATION, _captured_sdpa)
    AttentionMaskInterface.register(IMPLEMENTATION, AttentionMaskInterface()["sdpa"])


def _captured_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """The library's SDPA, after showing queries and keys to the active recorder, if any."""
    repeated: _Recorder | None = getattr(_repeated, "recorders", {}).get(module)
    recorder = _recorders.get(module) if repeated is None else repeated
    if recorder is not None:
        for name in _UNSUPPORTED:
            if kwargs.get(name) is not None:
                raise ModelError(
                    f"{type(module).__name__} passes `{name}` to attention, which the capture cannot "
                    "reproduce: cache this model's logits only"
                )
        recorder.observe(
            module,
            query,
            key,
            attention_mask=attention_mask,
            scaling=scaling,
            is_causal=is_causal,
            softcap=kwargs.get("softcap"),
            repeated=repeated is not None,
        )
    if kwargs.get("softcap") is not None:
        return capped_attention(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
    sdpa: Callable[..., tuple[Tensor, None]] = AttentionInterface()["sdpa"]
    return sdpa(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs)

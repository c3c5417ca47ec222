"""From one teacher pass to records: reduce on the device, encode per sample on the CPU."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import (
    Tile,
    grid_tile,
    overlap_matrix,
    pool_keys,
    tile_boxes,
    tiles_to_array,
)
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec, ProjectorOutputCodec, VisualHiddenCodec
from vlm_distill_cache.common.codecs.logits import LogitCodec, SparseLogits, VisualLogitsCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttention, RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import MapPreset, VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.text.collate import Batch, text_rows
from vlm_distill_cache.stage1_teacher.teacher.teacher import TeacherOutput


@dataclass(frozen=True, kw_only=True)
class TeacherSignals:
    """The reduced signals of one batch, before any codec quantises them.

    Attributes:
        logits: Rows of all samples; None if not wanted.
        answer_attention: Of each sample, cells ``[A, G, C]``; empty if not wanted.
        visual_map: Of each sample, ``[G, N, N]``; empty if not wanted.
        labels: Targets of all rows, int64 ``[A_total]``.
        row_counts: Rows of each sample.
        text_attention: Of each sample, cells ``[X, G, C]`` of all text rows behind its image; empty if not wanted.
        hidden: By signal: hidden states ``[R, S, D]`` of each sample's supervised rows or visual tokens.
        visual_logits: Rows of all visual tokens; None if not wanted.
        visual_counts: Visual tokens of each sample.
        visual_columns: Of each sample, ``[G, N]``: mean attention of a visual token over those that carry image; empty
            if not wanted.
    """

    logits: SparseLogits | None
    answer_attention: tuple[Tensor, ...]
    visual_map: tuple[Tensor, ...]
    labels: Tensor
    row_counts: tuple[int, ...]
    text_attention: tuple[Tensor, ...] = ()
    hidden: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    visual_logits: SparseLogits | None = None
    visual_counts: tuple[int, ...] = ()
    visual_columns: tuple[Tensor, ...] = ()


def build_codecs(
    *,
    signals: Sequence[str],
    logits: str,
    temperatures: tuple[float, ...],
    exact_attention: bool,
    grid: tuple[int, int],
    groups: int,
    map_preset: MapPreset = "exact",
    map_grid: int = 0,
    hidden_layers: tuple[int, ...] = (),
    width: int = 1,
    exact_hidden: bool = False,
) -> dict[str, Any]:
    """Build the codec of each wanted signal.

    Args:
        signals: Names from ``config.SIGNALS``.
        logits: Preset of the logit codec.
        temperatures: Temperatures whose tail mass is kept.
        exact_attention: float32 instead of 8-bit codes.
        grid: Rows and columns that answer and text attention are pooled to.
        groups: Number of layer groups.
        map_preset: What is kept of visual maps.
        map_grid: Side of the grid that the tokens of a visual map's tiles are pooled to; 0: not pooled.
        hidden_layers: Of ``hidden`` and ``visual_hidden``, counted as in ``common.attention.hidden``.
        width: Of the teacher's language model.
        exact_hidden: float32 instead of float16 for hidden states.

    Returns:
        Codec by signal.
    """
    build: dict[str, Any] = {
        "logits": lambda: LogitCodec.from_preset(logits, temperatures=temperatures),
        "answer_attention": lambda: RowAttentionCodec(grid=grid, groups=groups, exact=exact_attention),
        "text_attention": lambda: TextAttentionCodec(grid=grid, groups=groups, exact=exact_attention),
        "visual_columns": lambda: VisualColumnsCodec(groups=groups, exact=exact_attention),
        "visual_map": lambda: VisualMapCodec(
            groups=groups, preset="f4" if exact_attention else map_preset, grid=map_grid
        ),
    }
    states: dict[str, Any] = {"width": width, "exact": exact_hidden}
    build |= {
        "hidden": lambda: HiddenCodec(layers=hidden_layers, **states),
        "visual_hidden": lambda: VisualHiddenCodec(layers=hidden_layers, **states),
        "projector_output": lambda: ProjectorOutputCodec(**states),
        "visual_logits": lambda: VisualLogitsCodec.from_preset(logits, temperatures=temperatures),
    }
    return {name: build[name]() for name in signals}


@lru_cache(maxsize=64)  # where layouts follow the picture's size an entry may take megabytes
def _grid_overlap(tiles: tuple[Tile, ...], grid: tuple[int, int], device: torch.device) -> Tensor:
    overlap = overlap_matrix(tile_boxes(tiles), tile_boxes((grid_tile(*grid),)))
    return overlap.to(device, non_blocking=True)


def reduce_output(
    output: TeacherOutput, batch: Batch, codecs: Mapping[str, Any], *, checked: bool = True
) -> TeacherSignals:
    """Keep what the codecs need of one forward pass, still on the teacher's device.

    Args:
        output: One pass.
        batch: The batch it ran on, on the CPU.
        codecs: Codec by signal.
        checked: Refuse logits that are not finite; False leaves that to `check_finite`, and waits for no GPU.

    Returns:
        Signals whose attention is pooled to the codec's grid; dense logits are gone.
    """
    logits, visual_logits = None, None
    if "logits" in codecs:
        logits = codecs["logits"].select(output.logits, output.labels, checked=checked)
    if output.visual_logits is not None:
        likeliest = output.visual_logits.argmax(dim=1)  # a visual token has no ground truth
        visual_logits = codecs["visual_logits"].select(output.visual_logits, likeliest, checked=checked)
    answer: list[Tensor] = []
    text: list[Tensor] = []
    visual: list[Tensor] = []
    columns: list[Tensor] = []
    text_counts = (text_rows(batch) >= 0).sum(dim=1).tolist() if "text_attention" in codecs else []
    for index, (rows, tokens) in enumerate(zip(output.row_counts, output.visual_counts, strict=True)):
        if "answer_attention" in codecs:
            codec = codecs["answer_attention"]
            if tokens:
                attention = output.attention["answer"][index, :, :rows, :tokens]  # [G, A, N]
                answer.append(_pool_rows(attention, batch.tiles[index], codec.grid))  # [A, G, C]
            else:
                answer.append(torch.zeros(rows, codec.groups, codec.cells))
        if "text_attention" in codecs:
            codec = codecs["text_attention"]
            if tokens:
                attention = output.attention["text"][index, :, : text_counts[index], :tokens]  # [G, X, N]
                text.append(_pool_rows(attention, batch.tiles[index], codec.grid))  # [X, G, C]
            else:
                text.append(torch.zeros(0, codec.groups, codec.cells))
        if "visual_map" in codecs:
            codec = codecs["visual_map"]
            whole = torch.zeros(codec.groups, 0, 0)
            if tokens:
                whole = output.attention["visual"][index, :, :tokens, :tokens]  # [G, N, N]
            visual.append(whole)
        if "visual_columns" in codecs:
            none = torch.zeros(codecs["visual_columns"].groups, 0)
            columns.append(output.attention["columns"][index, :, 0, :tokens] if tokens else none)  # [G, N]
    return TeacherSignals(
        logits=logits,
        answer_attention=tuple(answer),
        visual_map=tuple(visual),
        labels=output.labels,
        row_counts=output.row_counts,
        text_attention=tuple(text),
        hidden={
            name: tuple(
                states[index, :count]
                for index, count in enumerate(output.row_counts if name == "hidden" else output.visual_counts)
            )
            for name, states in output.hidden.items()
        },
        visual_logits=visual_logits,
        visual_counts=output.visual_counts,
        visual_columns=tuple(columns),
    )


def _pool_rows(attention: Tensor, tiles: tuple[Tile, ...], grid: tuple[int, int]) -> Tensor:
    """Attention of some rows on visual tokens, ``[G, R, N]``, on the cells of a grid: ``[R, G, C]``."""
    overlap = _grid_overlap(tiles, grid, attention.device)
    return pool_keys(attention.transpose(0, 1), overlap)


def slice_logits(logits: SparseLogits, rows: slice) -> SparseLogits:
    """The rows of one sample."""
    return SparseLogits(
        token_ids=logits.token_ids[rows],
        log_probs=logits.log_probs[rows],
        entry_mask=logits.entry_mask[rows],
        tail_log_mass=logits.tail_log_mass[rows],
        temperatures=logits.temperatures,
    )


def encode_records(signals: TeacherSignals, batch: Batch, codecs: Mapping[str, Any]) -> list[Record]:
    """Encode a batch's signals into one record a sample.

    Args:
        signals: On the CPU.
        batch: The batch they belong to.
        codecs: Codec by signal.

    Returns:
        Records in the batch's order: the base fields and those of each codec.
    """
    labels = np.split(signals.labels.numpy().astype("<u4"), np.cumsum(signals.row_counts)[:-1])
    records: list[Record] = [
        {
            "image_hash": np.frombuffer(batch.image_hashes[index], dtype="u1").reshape(1, 16).copy(),
            "labels": labels[index],
            "tiles": tiles_to_array(batch.tiles[index]),
        }
        for index in range(len(batch))
    ]
    # Codes of rows depend on nothing but the row: a batch is encoded at once, then cut.
    if signals.logits is not None:
        _share_out(codecs["logits"], signals.logits, signals.row_counts, records)
    if signals.visual_logits is not None:
        _share_out(codecs["visual_logits"], signals.visual_logits, signals.visual_counts, records)
    for name, cells in (
        ("answer_attention", signals.answer_attention),
        ("text_attention", signals.text_attention),
    ):
        if name in codecs:
            attention = RowAttention.cat([RowAttention.from_cells(of_sample) for of_sample in cells])
            _share_out(codecs[name], attention, [len(of_sample) for of_sample in cells], records)
    for index, record in enumerate(records):
        if "visual_map" in codecs:
            record |= encode_map(codecs["visual_map"], signals.visual_map[index], batch.tiles[index])
        if "visual_columns" in codecs:
            record |= codecs["visual_columns"].encode(signals.visual_columns[index])
        for name, states in signals.hidden.items():
            record |= codecs[name].encode(states[index])
    return records


def _share_out(codec: Any, rows: Any, counts: Sequence[int], records: Sequence[Record]) -> None:
    """Encode rows of a batch, and add to each record what belongs to its own."""
    encoded: Record = codec.encode(rows)
    ends = np.cumsum(counts)
    for field_ in codec.fields():
        bounds = ends
        if field_.axis.endswith("entry"):  # several to a row
            bounds = np.concatenate([[0], np.cumsum(encoded[f"{field_.axis}_count"], dtype=np.int64)])[ends]
        for record, part in zip(records, np.split(encoded[field_.name], bounds[:-1]), strict=True):
            record[field_.name] = part


def encode_map(codec: VisualMapCodec, maps: Tensor, tiles: tuple[Tile, ...]) -> Record:
    """Pool a visual map to the codec's cells and encode it.

    Args:
        codec: Of the cache.
        maps: On the teacher's tokens, float32 ``[G, N, N]``.
        tiles: Of these tokens.

    Returns:
        The codec's fields.
    """
    return codec.encode(codec.pool(maps, tiles), tiles=tiles)


def to_cpu(signals: TeacherSignals, *, non_blocking: bool = False) -> TeacherSignals:
    """Copy the reduced signals off the device.

    Args:
        signals: On any devices.
        non_blocking: Only queue the copies, into page-locked memory; what `copies_done` returns says when they are made.
    """

    def copy(tensor: Tensor) -> Tensor:
        return tensor.to("cpu", non_blocking=non_blocking)

    def copy_logits(logits: SparseLogits | None) -> SparseLogits | None:
        return None if logits is None else logits.to("cpu", non_blocking=non_blocking)

    return TeacherSignals(
        logits=copy_logits(signals.logits),
        answer_attention=tuple(map(copy, signals.answer_attention)),
        visual_map=tuple(map(copy, signals.visual_map)),
        labels=copy(signals.labels),
        row_counts=signals.row_counts,
        text_attention=tuple(map(copy, signals.text_attention)),
        hidden={name: tuple(map(copy, states)) for name, states in signals.hidden.items()},
        visual_logits=copy_logits(signals.visual_logits),
        visual_counts=signals.visual_counts,
        visual_columns=tuple(map(copy, signals.visual_columns)),
    )


def copies_done(signals: TeacherSignals) -> tuple[torch.cuda.Event, ...]:
    """Record behind all work that is queued for signals: one event for each GPU that they lie on.

    Args:
        signals: On the devices that they were computed on.
    """
    devices = {tensor.device for tensor in _tensors(signals) if tensor.is_cuda}
    return tuple(torch.cuda.current_stream(device).record_event() for device in sorted(devices, key=str))


def check_finite(signals: TeacherSignals) -> None:
    """Refuse signals of logits or attention that are not finite.

    Args:
        signals: On the CPU, reduced unchecked.

    Raises:
        SampleError: If they are.
    """
    for logits in (signals.logits, signals.visual_logits):
        # A row that is no distribution has a NaN in front; log-probabilities of -inf are none of the teacher's faults.
        if logits is not None and bool(logits.log_probs[:, :1].isnan().any()):
            raise SampleError("the logits are not finite; try dtype=bfloat16 or float32")
    for attention in _attention(signals):
        if not bool(attention.isfinite().all()):
            raise SampleError("the attention is not finite; try dtype=float32")


def _tensors(signals: TeacherSignals) -> Iterator[Tensor]:
    for logits in (signals.logits, signals.visual_logits):
        if logits is not None:
            yield logits.log_probs
    yield from _attention(signals)
    for states in signals.hidden.values():
        yield from states


def _attention(signals: TeacherSignals) -> Iterator[Tensor]:
    yield from signals.answer_attention
    yield from signals.text_attention
    yield from signals.visual_map
    yield from signals.visual_columns

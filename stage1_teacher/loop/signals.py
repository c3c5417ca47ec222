"""One extractor a signal: what it asks of the teacher's pass, what it keeps of it on the device, and its records' part.

Dims: B batch, T longest sequence, A supervised rows, N visual tokens, R rows of a sample, G layer groups, C grid cells,
S layers, D width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import content_mask, overlap_matrix, pool_keys, tile_boxes
from vlm_distill_cache.common.attention.capture import AttentionRequest
from vlm_distill_cache.common.attention.hidden import HiddenRequest
from vlm_distill_cache.common.attention.tiles import (
    Tile,
    grid_tile,
    of_view,
    several_to_arrays,
    tiles_to_array,
    views_of,
)
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX, ONE_PICTURE, Record
from vlm_distill_cache.common.codecs.description import Codec
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec, ProjectorOutputCodec, VisualHiddenCodec
from vlm_distill_cache.common.codecs.live import (
    RowAttention,
    SparseLogits,
    TeacherMap,
    as_tensors,
    map_tensors,
    pool_map,
    select_entries,
)
from vlm_distill_cache.common.codecs.logits import LogitCodec, VisualLogitsCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.tower_attention import TowerAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.models.tokens.tower_attention import TowerRequest
from vlm_distill_cache.data.text.collate import Batch, supervised_rows, text_rows, visual_keys
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.teacher.inputs import Request

SHOWN = 8  # samples that an error names
BEYOND_FLOAT16 = 65520.0  # rounded to infinity, from here on
Out = TypeVar("Out")
Groups = tuple[tuple[int, ...], ...]
Positions = Callable[[Batch], Tensor]
"""From a batch to positions of some of its tokens, int64 ``[B, R]``, padding -1."""
Finder = Callable[[Positions], Tensor]
TeacherSignals = dict[str, Any]
"""The reduced signals of one batch by name, before any codec quantises them: rows of all samples, or a tensor a sample."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What codecs need to know of a teacher.

    Attributes:
        grid: Rows and columns that attention of rows is pooled to.
        several: Whether samples may have several pictures.
        videos: Whether some of them are frames of videos.
        layers: Of hidden states, counted as in ``common.attention.hidden``.
        width: Of the language model.
    """

    grid: tuple[int, int]
    layers: tuple[int, ...] = ()
    width: int = 1
    several: bool = False
    videos: bool = False


class Extractor(ABC):
    """How stage one gets one signal out of a teacher.

    Attributes:
        options: Fields of `BuildConfig` that its codec depends on.
        any_family: Whether it can be had of families that are not in the table.
        attention: Whether it needs the teacher's attention.
        causal: Whether visual tokens may only see what precedes them.
        at_images: Whether every visual token has a part in it.
    """

    options: tuple[str, ...] = ()
    any_family: ClassVar[bool] = False
    attention: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    at_images: bool = False

    @abstractmethod
    def codec(self, config: BuildConfig, sizes: Sizes) -> Codec:
        """The codec that a configuration asks for."""

    @abstractmethod
    def request(self, batch: Batch, at: Finder, codec: Any, groups: Groups) -> Request | None:
        """What it needs of a forward pass; None if the batch has nothing of it.

        Args:
            at: Finds positions in it: the same tensor each time, by which requests share rows.
        """

    @abstractmethod
    def reduce(self, found: Tensor | None, batch: Batch, codec: Any, *, checked: bool) -> Any:
        """Keep what the codec needs, still on the teacher's device.

        Args:
            found: What was requested; None if that was nothing.
            checked: Refuse logits that are not finite; False leaves that to `check`, and waits for no GPU.
        """

    @abstractmethod
    def encode(self, live: Any, batch: Batch, codec: Any) -> Sequence[Record]:
        """The part of each sample's record, from what `reduce` kept, on the CPU."""

    def decoded(self, live: Any, batch: Batch, codec: Any) -> Sequence[Any]:
        """Each sample's signal as losses take it, in tensors: of the type that its record decodes to.

        Here by way of the codec; an extractor that knows better gives what no codec has touched.
        """
        return [as_tensors(codec.decode(record)) for record in self.encode(live, batch, codec)]

    @abstractmethod
    def check(self, live: Any) -> None:
        """Refuse what is not finite, reduced unchecked and now on the CPU; raises SampleError."""

    def held_bytes(self, codec: Any, *, length: int, visual: int, width: int) -> int:
        """About what it holds of one sample until the pass is over.

        Args:
            length: Of the sample in tokens.
            width: Bytes of a number of the model's.
        """
        return 0


class _Logits(Extractor):
    """The likely tokens of supervised rows: ``SparseLogits`` of all samples."""

    options = ("logits", "temperatures")
    any_family = True
    kind: type[LogitCodec] = LogitCodec

    def mask(self, batch: Batch) -> Tensor:
        """The rows, bool ``[B, T]``."""
        return batch.labels != IGNORE_INDEX

    def targets(self, logits: Tensor, batch: Batch) -> Tensor:
        """The token that is kept of each row in any case, int64 ``[A]``."""
        return batch.labels[self.mask(batch)]

    def codec(self, config: BuildConfig, sizes: Sizes) -> Codec:
        return self.kind.from_preset(config.logits, temperatures=config.temperatures)

    def request(self, batch: Batch, at: Finder, codec: Any, groups: Groups) -> Request | None:
        return self.mask(batch)

    def reduce(self, found: Tensor | None, batch: Batch, codec: Any, *, checked: bool) -> SparseLogits:
        assert found is not None
        return select_entries(codec, found, self.targets(found, batch), checked=checked)

    def encode(self, live: SparseLogits, batch: Batch, codec: Any) -> Sequence[Record]:
        return _share_out(codec, live, self.mask(batch).sum(dim=1).tolist())

    def decoded(self, live: SparseLogits, batch: Batch, codec: Any) -> Sequence[Any]:
        ends = self.mask(batch).sum(dim=1).cumsum(dim=0).tolist()
        return [live.rows(slice(start, end)) for start, end in pairwise([0, *ends])]

    def check(self, live: SparseLogits) -> None:
        # A row that is no distribution has a NaN in front; log-probabilities of -inf are none of the teacher's faults.
        if bool(live.log_probs[:, :1].isnan().any()):
            raise SampleError("the logits are not finite; try dtype=bfloat16 or float32")


class _VisualLogits(_Logits):
    """The same of visual tokens, which have no ground truth: the likeliest token stands for it."""

    any_family = False
    at_images = True
    kind = VisualLogitsCodec

    def mask(self, batch: Batch) -> Tensor:
        return batch.visual_mask

    def targets(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits.argmax(dim=1)


class _Attention(Extractor):
    """A signal of attention: a tensor of each sample."""

    options: tuple[str, ...] = ("attention_dtype", "groups", "layers")
    attention = True

    def check(self, live: tuple[Any, ...]) -> None:
        views = [view for of_sample in live for view in (of_sample if isinstance(of_sample, tuple) else (of_sample,))]
        if not all(bool(view.isfinite().all()) for view in views):
            raise SampleError("the attention is not finite; try dtype=float32")


class _RowAttention(_Attention):
    """Where some rows look, pooled to a grid, of several pictures one on each view: cells ``[R, G, K]``; zero without an image."""

    options = (*_Attention.options, "grid", "frame_grid")

    def __init__(self, kind: type[RowAttentionCodec], rows: Positions) -> None:
        self._kind, self._rows = kind, rows

    def codec(self, config: BuildConfig, sizes: Sizes) -> Codec:
        side = config.frame_grid if sizes.videos else 0
        return self._kind(
            grid=sizes.grid,
            groups=config.groups,
            exact=config.attention_dtype == "f4",
            several=sizes.several,
            frame_grid=(side, side) if side else None,
        )

    def request(self, batch: Batch, at: Finder, codec: Any, groups: Groups) -> Request | None:
        return _attention(at(self._rows), at(visual_keys), groups)

    def reduce(self, found: Tensor | None, batch: Batch, codec: Any, *, checked: bool) -> tuple[Tensor, ...]:
        counts = zip(_counts(self._rows, batch), _counts(visual_keys, batch), strict=True)
        return tuple(
            torch.zeros(rows, codec.groups, sum(cell.token_count for cell in codec.cells_of(batch.tiles[index])))
            if found is None or not tokens
            else _pool_rows(found[index, :, :rows, :tokens], batch.tiles[index], codec)
            for index, (rows, tokens) in enumerate(counts)
        )

    def encode(self, live: tuple[Tensor, ...], batch: Batch, codec: Any) -> Sequence[Record]:
        if codec.several:
            return [
                codec.encode(RowAttention.from_cells(cells), tiles=tiles)
                for cells, tiles in zip(live, batch.tiles, strict=True)
            ]
        rows = RowAttention.cat([RowAttention.from_cells(cells) for cells in live])
        return _share_out(codec, rows, [len(cells) for cells in live])

    def decoded(self, live: tuple[Tensor, ...], batch: Batch, codec: Any) -> Sequence[Any]:
        return [RowAttention.from_cells(cells) for cells in live]


class _VisualMap(_Attention):
    """Attention of visual tokens on visual tokens: ``[G, N, N]``; of several views a tuple, each on its own tokens."""

    options = (*_Attention.options, "map_preset", "map_grid")
    causal = True
    at_images = True

    def codec(self, config: BuildConfig, sizes: Sizes) -> Codec:
        preset = "f4" if config.attention_dtype == "f4" else config.map_preset
        return VisualMapCodec(groups=config.groups, preset=preset, grid=config.map_grid)

    def request(self, batch: Batch, at: Finder, codec: Any, groups: Groups) -> Request | None:
        return _attention(at(visual_keys), at(visual_keys), groups)

    def reduce(self, found: Tensor | None, batch: Batch, codec: Any, *, checked: bool) -> tuple[Any, ...]:
        return tuple(
            torch.zeros(codec.groups, 0, 0) if found is None or not tokens else _view_maps(found[index], tiles)
            for index, (tokens, tiles) in enumerate(zip(_counts(visual_keys, batch), batch.tiles, strict=True))
        )

    def encode(self, live: tuple[Any, ...], batch: Batch, codec: Any) -> Sequence[Record]:
        pairs = zip(live, batch.tiles, strict=True)
        return [codec.encode(per_view(partial(pool_map, codec), maps, tiles), tiles=tiles) for maps, tiles in pairs]

    def decoded(self, live: tuple[Any, ...], batch: Batch, codec: Any) -> Sequence[Any]:
        def filtered(maps: Tensor, tiles: tuple[Tile, ...]) -> TeacherMap:
            content = content_mask(tile_boxes(codec.cells_of(tiles))) if tiles else None
            return TeacherMap.from_maps(pool_map(codec, maps, tiles), token_mask=content)

        return [per_view(filtered, maps, tiles) for maps, tiles in zip(live, batch.tiles, strict=True)]

    def held_bytes(self, codec: Any, *, length: int, visual: int, width: int) -> int:
        return int(codec.groups) * visual * visual * 4


class _VisualColumns(_Attention):
    """The mean of these maps over the visual tokens that carry image, of each view on its own: ``[G, N]``."""

    at_images = True

    def codec(self, config: BuildConfig, sizes: Sizes) -> Codec:
        return VisualColumnsCodec(groups=config.groups, exact=config.attention_dtype == "f4")

    def request(self, batch: Batch, at: Finder, codec: Any, groups: Groups) -> Request | None:
        keys = at(visual_keys)
        weights = image_weights(batch, keys)
        return _attention(keys, keys, groups, weights if most_views(batch) > 1 else weights[:, 0])

    def reduce(self, found: Tensor | None, batch: Batch, codec: Any, *, checked: bool) -> tuple[Tensor, ...]:
        if found is None:
            return tuple(torch.zeros(codec.groups, 0) for _ in batch.tiles)
        return tuple(
            torch.cat([found[index, :, view, own] for view, own in enumerate(view_slices(tiles))], dim=1)
            if tiles
            else torch.zeros(codec.groups, 0)
            for index, tiles in enumerate(batch.tiles)
        )

    def encode(self, live: tuple[Tensor, ...], batch: Batch, codec: Any) -> Sequence[Record]:
        return [codec.encode(columns) for columns in live]

    def decoded(self, live: tuple[Tensor, ...], batch: Batch, codec: Any) -> Sequence[Any]:
        return [columns.float() for columns in live]


class _Hidden(Extractor):
    """Hidden states of some rows: ``[R, S, D]`` of each sample, in the model's dtype."""

    def __init__(self, kind: type[HiddenCodec], rows: Positions) -> None:
        self._kind, self._rows = kind, rows
        self.at_images = rows is visual_keys
        self._chosen = kind is not ProjectorOutputCodec  # which has one layer
        self.options = (*(("hidden_layers",) if self._chosen else ()), "hidden_dtype")

    def codec(self, config: BuildConfig, sizes: Sizes) -> Codec:
        layers = {"layers": sizes.layers} if self._chosen else {}
        return self._kind(width=sizes.width, exact=config.hidden_dtype == "f4", **layers)

    def request(self, batch: Batch, at: Finder, codec: Any, groups: Groups) -> Request | None:
        return HiddenRequest(at(self._rows), codec.layers)

    def reduce(self, found: Tensor | None, batch: Batch, codec: Any, *, checked: bool) -> tuple[Tensor, ...]:
        assert found is not None
        # What the codec would make infinite is so at once, so that `check` finds it before anything is encoded.
        kept = found if codec.exact else found.masked_fill(found.abs() >= BEYOND_FLOAT16, torch.inf)
        return tuple(kept[index, :count] for index, count in enumerate(_counts(self._rows, batch)))

    def encode(self, live: tuple[Tensor, ...], batch: Batch, codec: Any) -> Sequence[Record]:
        return [codec.encode(states.float()) for states in live]

    def decoded(self, live: tuple[Tensor, ...], batch: Batch, codec: Any) -> Sequence[Any]:
        return [states.float() for states in live]

    def check(self, live: tuple[Tensor, ...]) -> None:
        if not all(bool(of_sample.isfinite().all()) for of_sample in live):
            raise SampleError(
                f"{self._kind.signal}: hidden states that are not finite, or too large for float16; set hidden_dtype=f4, and "
                "dtype=bfloat16 or float32 if the teacher runs in float16"
            )

    def held_bytes(self, codec: Any, *, length: int, visual: int, width: int) -> int:
        return len(codec.layers) * length * int(codec.width) * width


class _TowerAttention(_Attention):
    """What each visual token receives inside the vision tower: ``[N]`` of each sample."""

    at_images = True

    options = ("attention_dtype",)
    attention = False  # of the language model

    def codec(self, config: BuildConfig, sizes: Sizes) -> Codec:
        return TowerAttentionCodec(exact=config.attention_dtype == "f4")

    def request(self, batch: Batch, at: Finder, codec: Any, groups: Groups) -> Request | None:
        counts = _counts(visual_keys, batch)
        return TowerRequest(tuple(counts)) if any(counts) else None

    def reduce(self, found: Tensor | None, batch: Batch, codec: Any, *, checked: bool) -> tuple[Tensor, ...]:
        counts = _counts(visual_keys, batch)
        return tuple((torch.zeros(0) if found is None else found).split(counts))

    def encode(self, live: tuple[Tensor, ...], batch: Batch, codec: Any) -> Sequence[Record]:
        return [codec.encode(received) for received in live]

    def decoded(self, live: tuple[Tensor, ...], batch: Batch, codec: Any) -> Sequence[Any]:
        return list(live)


EXTRACTORS: dict[str, Extractor] = {
    "logits": _Logits(),
    "answer_attention": _RowAttention(RowAttentionCodec, supervised_rows),
    "text_attention": _RowAttention(TextAttentionCodec, text_rows),
    "visual_map": _VisualMap(),
    "visual_columns": _VisualColumns(),  # behind the maps, of whose rows it is then the mean
    "hidden": _Hidden(HiddenCodec, supervised_rows),
    "visual_hidden": _Hidden(VisualHiddenCodec, visual_keys),
    "projector_output": _Hidden(ProjectorOutputCodec, visual_keys),
    "visual_logits": _VisualLogits(),
    "tower_attention": _TowerAttention(),
}


def build_codecs(config: BuildConfig, sizes: Sizes) -> dict[str, Codec]:
    """The codec of each signal that a configuration asks for."""
    return {name: EXTRACTORS[name].codec(config, sizes) for name in config.signals}


def requests_of(batch: Batch, codecs: Mapping[str, Codec], groups: Groups) -> dict[str, Request]:
    """What the signals of some codecs need of a forward pass, by signal."""

    @cache
    def at(positions: Positions) -> Tensor:
        return positions(batch)

    wanted = {
        name: extractor.request(batch, at, codecs[name], groups)
        for name, extractor in EXTRACTORS.items()
        if name in codecs
    }
    return {name: request for name, request in wanted.items() if request is not None}


def reduce_output(
    found: Mapping[str, Tensor], batch: Batch, codecs: Mapping[str, Codec], *, checked: bool = True
) -> TeacherSignals:
    """Keep what the codecs need of one forward pass, still on the teacher's device.

    Args:
        checked: Refuse logits that are not finite; False leaves that to `check_finite`, and waits for no GPU.
    """
    return {
        name: EXTRACTORS[name].reduce(found.get(name), batch, codec, checked=checked)
        for name, codec in codecs.items()
        if name in EXTRACTORS
    }


def to_cpu(signals: TeacherSignals, *, non_blocking: bool = False) -> TeacherSignals:
    """Copy the reduced signals off the device.

    Args:
        non_blocking: Only queue the copies, into page-locked memory; what `copies_done` returns says when they are made.
    """
    copied: TeacherSignals = map_tensors(signals, lambda tensor: tensor.to("cpu", non_blocking=non_blocking))
    return copied


def copies_done(signals: TeacherSignals) -> tuple[torch.cuda.Event, ...]:
    """Record behind all work that is queued for signals: one event for each GPU that they lie on."""
    devices: set[torch.device] = set()

    def note(tensor: Tensor) -> Tensor:
        devices.update({tensor.device} if tensor.is_cuda else ())
        return tensor

    map_tensors(signals, note)
    return tuple(torch.cuda.current_stream(device).record_event() for device in sorted(devices, key=str))


def check_finite(signals: TeacherSignals) -> None:
    """Refuse signals, reduced unchecked and now on the CPU, that are not finite; raises SampleError."""
    for name, live in signals.items():
        EXTRACTORS[name].check(live)


def encode_records(
    signals: TeacherSignals, batch: Batch, codecs: Mapping[str, Codec], *, version: int = ONE_PICTURE
) -> list[Record]:
    """Encode a batch's signals into one record a sample; SampleError names the samples of a batch that cannot be.

    Args:
        codecs: Codec of each signal that records get.
        version: Format version of the records.

    Returns:
        Records in the batch's order: the base fields of the version and those of each codec.
    """
    records: list[Record] = [_base(batch, index, version) for index in range(len(batch))]
    for name, live in signals.items():
        if name in codecs:
            try:
                parts = EXTRACTORS[name].encode(live, batch, codecs[name])
            except SampleError as error:
                raise SampleError(f"{named(batch.sample_ids)}: {error}") from error
            for record, part in zip(records, parts, strict=True):
                record |= part
    return records


def _base(batch: Batch, index: int, version: int) -> Record:
    """The base fields of one sample's record."""
    labels, tiles = batch.labels[index], batch.tiles[index]
    hashes = np.frombuffer(batch.image_hashes[index], dtype="u1").reshape(-1, 16).copy()
    kept = {"labels": labels[labels != IGNORE_INDEX].numpy().astype("<u4")}
    if version == ONE_PICTURE:
        return {"image_hash": hashes, **kept, "tiles": tiles_to_array(tiles)}
    hashes = hashes if tiles else hashes[:0]
    times = batch.frame_times[index] if batch.frame_times else ()
    return {"image_hash": hashes, **kept, **several_to_arrays(tiles, times, len(hashes))}


def named(sample_ids: Sequence[str]) -> str:
    """Which samples are worked on, for errors."""
    shown = ", ".join(map(repr, sample_ids[:SHOWN]))
    more = f" and {len(sample_ids) - SHOWN} more of one batch" if len(sample_ids) > SHOWN else ""
    return f"sample{'s' * (len(sample_ids) > 1)} {shown}{more}"


def _share_out(codec: Codec, rows: Any, counts: Sequence[int]) -> list[Record]:
    """Encode rows of a batch, and give each sample its own: codes of rows depend on nothing but the row."""
    encoded, ends = codec.encode(rows), np.cumsum(counts)
    records: list[Record] = [{} for _ in counts]
    for field in codec.fields():
        bounds = ends
        if field.axis.endswith("entry"):  # several to a row
            bounds = np.concatenate([[0], np.cumsum(encoded[f"{field.axis}_count"], dtype=np.int64)])[ends]
        for record, part in zip(records, np.split(encoded[field.name], bounds[:-1]), strict=True):
            record[field.name] = part
    return records


def _counts(positions: Positions, batch: Batch) -> list[int]:
    """How many tokens of each sample are at some positions."""
    counts: list[int] = (positions(batch) >= 0).sum(dim=1).tolist()
    return counts


def _attention(rows: Tensor, keys: Tensor, groups: Groups, weights: Tensor | None = None) -> AttentionRequest | None:
    """A request, if any sample of the batch has visual tokens."""
    return AttentionRequest(rows, keys, groups, weights) if keys.shape[1] else None


def image_weights(batch: Batch, keys: Tensor) -> Tensor:
    """What a visual token counts in the mean over those of its sample that carry image; padding does not.

    Args:
        keys: Positions of the visual tokens, int64 ``[B, N]``, padding -1.

    Returns:
        float32 ``[B, V, N]``: a row for each of the most views of a sample, 1 at least; 0 at tokens of other views.
    """
    weights = torch.zeros(len(keys), max(1, most_views(batch)), keys.shape[1])
    for index, tiles in enumerate(batch.tiles):
        content = content_mask(tile_boxes(tiles)).float()  # [N]
        for view, own in enumerate(view_slices(tiles)):
            weights[index, view, own] = content[own] / content[own].sum().clamp_min(1.0)
    return weights


def most_views(batch: Batch) -> int:
    """Views of the sample that has the most of them."""
    return max((len(views_of(tiles)) for tiles in batch.tiles), default=0)


def view_slices(tiles: tuple[Tile, ...]) -> list[slice]:
    """The visual tokens of each view, which stand one behind the other."""
    ends = np.cumsum([0, *(sum(tile.token_count for tile in of_view(tiles, view)) for view in views_of(tiles))])
    return [slice(int(begin), int(end)) for begin, end in pairwise(ends)]


def per_view(function: Callable[[Tensor, tuple[Tile, ...]], Out], maps: Any, tiles: tuple[Tile, ...]) -> Any:
    """Apply a function to the map of each view and its tiles; of one view its result alone, as `_view_maps` has it."""
    if isinstance(maps, tuple):
        return tuple(function(own, of_view(tiles, view)) for own, view in zip(maps, views_of(tiles), strict=True))
    return function(maps, tiles)


def _view_maps(maps: Tensor, tiles: tuple[Tile, ...]) -> Any:
    """The part ``[G, N, N]`` of a sample's map that each view has on itself: a tuple, or of one view the tensor."""
    found = tuple(maps[:, own, own] for own in view_slices(tiles))
    return found[0] if len(found) == 1 else found


@lru_cache(maxsize=64)  # where layouts follow the picture's size an entry may take megabytes
def _grid_overlap(tiles: tuple[Tile, ...], grid: tuple[int, int], device: torch.device) -> Tensor:
    overlap = overlap_matrix(tile_boxes(tiles), tile_boxes((grid_tile(*grid),)))
    return overlap.to(device, non_blocking=True)


def _pool_rows(attention: Tensor, tiles: tuple[Tile, ...], codec: RowAttentionCodec) -> Tensor:
    """Attention of some rows on visual tokens, ``[G, R, N]``, on the cells of each view: ``[R, G, K]``.

    View by view: tokens share nothing with cells of another one, and frames of one size have one overlap.
    """
    cells = codec.cells_of(tiles)
    parts = [
        pool_keys(
            attention[:, :, own].transpose(0, 1),
            _grid_overlap(of_view(tiles, view), (cell.rows, cell.cols), attention.device),
        )
        for view, own, cell in zip(views_of(tiles), view_slices(tiles), cells, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

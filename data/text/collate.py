"""Sequences of different lengths as one batch: right padding, and masks only where they are needed.

Dims: B batch, T longest sequence, M images of the batch, R most supervised rows, N most visual tokens,
X most text rows behind the first picture's visual tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.tiles import Tile
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.cache.shared_images import prefix_key
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.data.images.byte_pixels import Held, held_of, joined
from vlm_distill_cache.data.text.encoding import EncodedSample

VIDEO_INPUTS = frozenset(("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"))
"""Arguments of models that are of videos alone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What a model and its losses need of several samples.

    Attributes:
        input_ids: int64 ``[B, T]``.
        labels: int64 ``[B, T]``, shifted: the target of each row, or `IGNORE_INDEX`.
        attention_mask: bool ``[B, T]``, True at tokens; or, if any sample is packed, bool
            ``[B, 1, T, T]``, True where query (second to last) may see key (last), causality included.
        position_ids: int64 ``[B, T]``.
        visual_mask: bool ``[B, T]``.
        image_inputs: Of all images in order, by the model's argument name (``pixel_values`` float32
            ``[M, 3, H, W]``, ...); empty if no sample has one.
        image_hashes: Of each sample, 16 bytes for each of its pictures; zeros without one.
        frame_times: Of each sample, as `EncodedSample.frame_times`.
        lengths: Tokens of each sample without padding.
    """

    sample_ids: tuple[str, ...]
    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    visual_mask: Tensor
    image_inputs: Mapping[str, Tensor]
    tiles: tuple[tuple[Tile, ...], ...]
    image_hashes: tuple[bytes, ...]
    lengths: tuple[int, ...]
    frame_times: tuple[tuple[tuple[int, float], ...], ...] = ()

    def __len__(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        pictures = {name: tensor.to(device) for name, tensor in self.image_inputs.items()}
        return replace(self, **tensors, image_inputs=pictures)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a model without peculiarities; no ``pixel_values`` where there is no image."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            **self.image_inputs,
        }


def collate(samples: Sequence[EncodedSample], pad_token_id: int) -> Batch:
    """Pad samples on the right to the longest.

    Padding has position 0 and no label.

    Raises:
        ConfigError: There are no samples, or their pictures differ in size.
    """
    if not samples:
        raise ConfigError("cannot collate 0 samples; a batch needs at least one")
    lengths = [len(sample) for sample in samples]
    shape = (len(samples), max(lengths))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    visual_mask = np.zeros(shape, dtype=bool)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        input_ids[row, :length] = sample.input_ids
        labels[row, :length] = sample.labels
        position_ids[row, :length] = sample.position_ids
        visual_mask[row, :length] = sample.visual_mask
    packed = any(sample.is_packed for sample in samples)
    return Batch(
        sample_ids=tuple(sample.sample_id for sample in samples),
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        attention_mask=_block_mask(samples, shape[1])
        if packed
        else torch.arange(shape[1]) < torch.tensor(lengths)[:, None],
        position_ids=torch.from_numpy(position_ids),
        visual_mask=torch.from_numpy(visual_mask),
        image_inputs=join_image_inputs(samples),
        tiles=tuple(sample.tiles for sample in samples),
        image_hashes=tuple(sample.image_hash for sample in samples),
        lengths=tuple(lengths),
        frame_times=tuple(sample.frame_times for sample in samples),
    )


def supervised_rows(batch: Batch) -> Tensor:
    """Positions with a label, int64 ``[B, R]``, ascending, -1 behind each sample's last."""
    return _positions(batch.labels != IGNORE_INDEX)


def visual_keys(batch: Batch) -> Tensor:
    """Positions of visual tokens, int64 ``[B, N]``, ascending, -1 behind each sample's last."""
    return _positions(batch.visual_mask)


def text_rows(batch: Batch) -> Tensor:
    """Positions of the text behind the first view's visual tokens, int64 ``[B, X]``, ascending, -1 behind each sample's last.

    These are all rows, of questions and answers alike, that see a whole picture; none without one. Of a sample with one
    picture they see it all; of one with several those in front of a row, as the model does.
    """
    seen = batch.visual_mask.cumsum(dim=1)
    first = torch.tensor([_first_view(tiles) for tiles in batch.tiles], device=seen.device)[:, None]  # [B, 1]
    positions = torch.arange(batch.visual_mask.shape[1], device=seen.device)
    real = positions[None, :] < torch.tensor(batch.lengths, device=seen.device)[:, None]
    return _positions((seen >= first) & (first > 0) & ~batch.visual_mask & real)


def text_row_count(sample: EncodedSample) -> int:
    """How many of `text_rows` a sample has, X."""
    first = _first_view(sample.tiles)
    return int((~sample.visual_mask[np.flatnonzero(sample.visual_mask)[first - 1] :]).sum()) if first else 0


def _first_view(tiles: Sequence[Tile]) -> int:
    """Visual tokens of the picture, or temporal patch, that stands first; 0 without one."""
    return sum(tile.token_count for tile in tiles if tile.span == tiles[0].span)


def image_key(sample: EncodedSample) -> str | None:
    """Name all that a sample's visual rows can see: its pictures and the tokens up to their last; None without one."""
    if not sample.visual_mask.any():
        return None
    return prefix_key(sample.image_hash, sample.input_ids[: _prefix_length(sample)], sample.frame_times)


def _prefix_length(sample: EncodedSample) -> int:
    """Tokens up to and including the last visual one."""
    return int(np.flatnonzero(sample.visual_mask)[-1]) + 1


def length_buckets(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Split the samples of one shard into batches of similar length, so that little is padding.

    A function of the lengths alone: a resumed run forms the same batches, and so the same
    floating-point sums, as an uninterrupted one.

    Returns:
        Batches of indices into ``lengths``, longest first (memory runs out at once or never).
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1 sample, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def joinable(samples: Sequence[EncodedSample]) -> list[list[EncodedSample]]:
    """Split samples into groups whose pictures can be joined, in order; one without goes with the one in front of it.

    Pictures of one of our image encoders always join, videos of some only if they have equally many frames. The library's
    own processors may make arrays of another shape, or other arrays, of each picture.
    """
    groups: list[tuple[dict[bool, object], list[EncodedSample]]] = []
    last: tuple[dict[bool, object], list[EncodedSample]] | None = None
    for sample in samples:
        kinds: dict[bool, object] = {
            videos: frozenset((name, array.shape[1:]) for name, array in part.items())
            for videos in (False, True)
            if (part := _inputs_of(sample, videos=videos))
        }
        fits = (group for group in groups if all(group[0].get(kind, key) == key for kind, key in kinds.items()))
        group = next(fits, None) if kinds else last
        if group is None:
            group = ({}, [])
            groups.append(group)
        group[0].update(kinds)
        group[1].append(sample)
        last = group
    return [members for _, members in groups]


def _block_mask(samples: Sequence[EncodedSample], longest: int) -> Tensor:
    """Causal, and blind between segments other than the shared prefix, bool ``[B, 1, T, T]``.

    Padding rows see themselves and nothing else: a softmax over no key at all would be NaN.
    """
    mask = np.zeros((len(samples), 1, longest, longest), dtype=bool)
    causal = np.tri(longest, dtype=bool)
    for row, sample in enumerate(samples):
        length, segments = len(sample), sample.segment_ids
        visible = (segments[None, :] == 0) | (segments[None, :] == segments[:, None])
        mask[row, 0, :length, :length] = visible & causal[:length, :length]
    diagonal = np.arange(longest)
    mask[:, :, diagonal, diagonal] = True
    return torch.from_numpy(mask)


def join_image_inputs(samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
    """Join the image arrays of samples along their first axis, by argument name; empty without an image.

    Pictures of any-resolution layouts differ in tiles, those of dynamic ones in patches: both join. So do pictures and
    videos, which have arguments of their own; some models take only videos of equally many frames in one batch.
    """
    found: dict[str, Tensor] = {}
    for videos in (False, True):
        parts = [part for sample in samples if (part := _inputs_of(sample, videos=videos))]
        names = {tuple(sorted(part)) for part in parts}
        if len(names) > 1:
            raise ConfigError(f"pictures of one batch have different inputs {sorted(names)}; use one image encoder")
        for name in parts[0] if parts else ():
            arrays = [part[name] for part in parts]
            shapes = {array.shape[1:] for array in arrays}
            if len(shapes) > 1 and videos:
                raise ConfigError(
                    f"videos of one batch differ in frames or size ({name}: {sorted(shapes)}), which this model cannot take "
                    "in one pass; pass samples one by one (micro_batch_size=1, the same gradients), each with one video"
                )
            if len(shapes) > 1:
                raise ConfigError(
                    f"pictures of one batch differ in size ({name}: {sorted(shapes)}); use one image encoder"
                )
            found[name] = torch.from_numpy(joined(arrays))
    return found


def _inputs_of(sample: EncodedSample, *, videos: bool) -> dict[str, Held]:
    """The image arrays of a sample that are of videos, or those that are not."""
    return {name: array for name, array in held_of(sample.image_inputs).items() if (name in VIDEO_INPUTS) == videos}


def _positions(mask: Tensor) -> Tensor:
    """Column indices of True, in order, padded with -1 to the fullest row."""
    counts = mask.sum(dim=1)
    width = int(counts.max())
    # A stable sort of "not set" brings the set columns to the front without changing their order.
    order = torch.sort((~mask).to(torch.uint8), dim=1, stable=True).indices[:, :width]
    return torch.where(torch.arange(width, device=mask.device)[None, :] < counts[:, None], order, -1)

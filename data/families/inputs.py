"""The keyword arguments of each family's forward pass: masks and positions that differ from a plain decoder's.

Each function takes the model's configuration, a batch and a dtype. They differ in what a visual token may see
(Gemma 3: its whole image; PaliGemma: the whole prompt), in how positions count (Qwen-VL: time, row and column;
PaliGemma: from 1), in sliding windows, in how pictures are stacked, and in what is said of several (LLaVA-OneVision).

Dims: B batch, T longest sequence, M image tiles of the batch.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vlm_distill_cache.common.attention.tiles import Tile
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.data.text.collate import Batch

Masks = Tensor | dict[str, Tensor]


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    return config.get_text_config()


def known_positions(config: Any) -> int | None:
    """How many tokens a conversation may have for a model: what its configuration says, and None if that is nothing.

    ``max_position_embeddings`` of the language model; where rotary positions are scaled, the factor times the length that
    the scaling begins with, if that is more: some configurations name the length after scaling, others the one before.

    Raises:
        ModelError: If the configuration names something that is no number.
    """
    text = text_config(config)
    stated = getattr(text, "max_position_embeddings", None)
    if stated is None:
        return None
    if isinstance(stated, bool) or not isinstance(stated, int) or stated < 1:
        raise ModelError(
            f"config.json: max_position_embeddings is {stated!r}, expected a whole number of at least 1; use the config.json "
            "of the checkpoint"
        )
    # Where each kind of layer has scaling of its own (Gemma 3), what is stated is the length after it.
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factor, begins = rope.get("factor"), rope.get("original_max_position_embeddings") or stated
    if not isinstance(factor, int | float) or (rope.get("rope_type") or rope.get("type")) == "default":
        return stated
    return max(stated, int(factor * begins))


def plain_inputs(config: Any, batch: Batch, *, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a model whose mask and positions are those of any causal language model.

    Args:
        batch: On the model's device.
        dtype: Of floating-point image inputs.
    """
    return {
        "input_ids": batch.input_ids,
        "attention_mask": attention_masks(config, batch),
        "position_ids": batch.position_ids,
        **image_tensors(batch, dtype),
    }


def stacked_inputs(config: Any, batch: Batch, *, dtype: torch.dtype) -> dict[str, Any]:
    """As `plain_inputs`, the tiles of all pictures as those of one sample ``[1, M, ...]`` (Idefics 3, SmolVLM).

    The library's processor pads each sample to the fullest one's number of tiles with black tiles, which the
    model then throws away; features come out in the order of the tiles either way.
    """
    inputs = plain_inputs(config, batch, dtype=dtype)
    tiles = {name: tensor[None] for name, tensor in image_tensors(batch, dtype).items()}
    return inputs | tiles


def counted_inputs(config: Any, batch: Batch, *, dtype: torch.dtype) -> dict[str, Any]:
    """As `plain_inputs`; where a sample has several pictures, with ``batch_num_images`` int64 ``[samples with pictures]``.

    The model takes a picture that is its sample's only one for cut into tiles, and others for whole (LLaVA-OneVision).
    """
    counts = [_pictures(config, batch, row) for row in range(len(batch))]
    inputs = plain_inputs(config, batch, dtype=dtype)
    if max(counts) <= 1:
        return inputs
    return inputs | {"batch_num_images": torch.tensor([count for count in counts if count])}


def _pictures(config: Any, batch: Batch, row: int) -> int:
    """How many views of a sample stand for the image token, not for that of videos."""
    tiles = batch.tiles[row]
    ids = batch.input_ids[row][batch.visual_mask[row]].tolist()
    first = accumulate((tile.token_count for tile in tiles), initial=0)
    views = {tile.span: ids[start] for tile, start in zip(tiles, first, strict=False)}
    return sum(token != config.video_token_id for token in views.values())


def grid_position_inputs(config: Any, batch: Batch, *, dtype: torch.dtype) -> dict[str, Any]:
    """As `plain_inputs`, positions int64 ``[3, B, T]``: time, row and column of each token (Qwen-VL).

    A visual token at row r and column c of a picture that begins at position s stands at (s, s + r, s + c); the
    text behind it goes on at s + max(rows, columns). Temporal patches of a video that follow each other without text
    (Qwen2-VL, 2.5) are one such picture, whose n-th patch stands n times ``tokens_per_second`` (2.5; 1 without it) times the
    seconds of a patch later in time (``second_per_grid_ts`` of the image inputs, float ``[videos]``; 1 without it). Text is
    at the same place on all three axes. Derived from the batch's own positions, which count on from the shared prefix in
    packed samples, so it holds for both.

    Source:
        Qwen2-VL (arXiv:2409.12191), section 2.1, multimodal rotary position embedding; time by seconds: Qwen2.5-VL
        (arXiv:2502.13923), section 2.1.2.
    """
    inputs = plain_inputs(config, batch, dtype=dtype)
    seconds = batch.image_inputs.get("second_per_grid_ts")
    if seconds is not None:
        inputs["second_per_grid_ts"] = seconds  # whatever the dtype of pixels
    positions = batch.position_ids.expand(3, -1, -1).clone()
    paces = _paces(config, batch)
    for row, tiles in enumerate(batch.tiles):
        if not tiles:
            continue
        visual = torch.nonzero(batch.visual_mask[row]).squeeze(1)  # [N]
        own = batch.position_ids[row].contiguous()  # [T]
        runs = _runs(tiles, visual.tolist(), [(row, video) for video in _videos(batch, row)], paces)
        grid, counts, advances = (part.to(visual.device) for part in runs)
        begins = own[visual[counts.cumsum(0) - counts]]  # [runs]
        behind = torch.cat([counts.new_zeros(1), (advances - counts).cumsum(0)])
        # Padding stays at 0 like every position in front of the first picture.
        positions[:, row] += behind[torch.searchsorted(begins + counts, own, right=True)]
        positions[:, row, visual] = (begins + behind[:-1]).repeat_interleave(counts) + grid
    return inputs | {"position_ids": positions}


def _videos(batch: Batch, row: int) -> list[int]:
    """Of each of a sample's tiles the medium that it shows frames of; -1: of none."""
    times = batch.frame_times[row] if batch.frame_times else ()
    return [times[int(tile.span[0])][0] if tile.is_frame else -1 for tile in batch.tiles[row]]


def _paces(config: Any, batch: Batch) -> dict[tuple[int, int], Tensor | float]:
    """By sample and medium of a batch's videos: how far apart in time the positions of its temporal patches are."""
    rate = getattr(config.vision_config, "tokens_per_second", None) or 1
    videos = dict.fromkeys((row, video) for row in range(len(batch)) for video in _videos(batch, row) if video >= 0)
    seconds = batch.image_inputs.get("second_per_grid_ts")
    paces = [rate] * len(videos) if seconds is None else list(rate * seconds.cpu())
    return dict(zip(videos, paces, strict=True))


def _runs(
    tiles: Sequence[Tile],
    places: Sequence[int],
    videos: Sequence[tuple[int, int]],
    paces: Mapping[tuple[int, int], Tensor | float],
) -> tuple[Tensor, Tensor, Tensor]:
    """What of a sample's visual tokens stands together: a picture, or temporal patches of a video without text between.

    Args:
        tiles: One a picture or temporal patch.
        places: Of its N visual tokens, ascending.
        videos: Of each tile what it shows frames of.
        paces: Of each video; a still picture has none.

    Returns:
        Time, row and column of each token in its run, int64 ``[3, N]``; of each run its tokens, and by how much positions go
        on behind it, int64 ``[runs]`` both.
    """
    grids, counts, advances = list[Tensor](), list[int](), list[int]()
    start, patch = 0, 0
    for index, (tile, video) in enumerate(zip(tiles, videos, strict=True)):
        follows = index > 0 and video == videos[index - 1] and places[start] == places[start - 1] + 1
        patch = patch + 1 if follows and video in paces else 0
        token = torch.arange(tile.token_count)
        time = int(patch * paces.get(video, 1))  # the library cuts fractions off, too
        grids.append(torch.stack([torch.full_like(token, time), token // tile.cols, token % tile.cols]))
        if not patch:
            counts.append(0)
            advances.append(max(tile.rows, tile.cols))
        counts[-1] += tile.token_count
        start += tile.token_count
    return torch.cat(grids, dim=1), torch.tensor(counts), torch.tensor(advances)


def image_block_inputs(config: Any, batch: Batch, *, dtype: torch.dtype) -> dict[str, Any]:
    """As `plain_inputs`, every visual token sees its whole image, and of other images those in front (Gemma 3).

    Where nothing is packed the library builds the masks itself, from token types: an image is a run of visual tokens.
    """
    inputs = plain_inputs(config, batch, dtype=dtype)
    if batch.attention_mask.ndim == 2:
        return inputs | {"token_type_ids": batch.visual_mask.long()}
    visual = batch.visual_mask
    begins = visual & ~torch.nn.functional.pad(visual, (1, -1))
    image = torch.where(visual, begins.cumsum(dim=1), 0)  # [B, T], 0: text
    block = (image[:, None, :, None] == image[:, None, None, :]) & visual[:, None, :, None]  # [B, 1, T, T]
    return inputs | {"attention_mask": _windowed(config, batch, batch.attention_mask | block)}


def prefix_inputs(config: Any, batch: Batch, *, dtype: torch.dtype) -> dict[str, Any]:
    """As `plain_inputs`, everything in front of the answer sees everything in front of it (PaliGemma).

    The prompt ends with the first supervised row (its target is the first answer token); without labels all is
    prompt. Positions count from 1.

    Raises:
        ModelError: If samples are packed: image and question see each other, so questions cannot share an image.

    Source:
        PaliGemma (arXiv:2407.07726), section 3.2.1, figure 2.
    """
    if batch.attention_mask.ndim == 4:
        raise ModelError(
            "this family's visual tokens see the question, so independent conversations about one picture cannot "
            "share it in one sequence; give them as samples of their own (one turn each)"
        )
    supervised = batch.labels != IGNORE_INDEX
    positions = torch.arange(supervised.shape[1], device=supervised.device)
    longest = supervised.shape[1]
    last = torch.where(supervised.any(dim=1), supervised.int().argmax(dim=1), longest)  # [B]
    return plain_inputs(config, batch, dtype=dtype) | {
        "position_ids": batch.position_ids + 1,
        "token_type_ids": (positions[None, :] > last[:, None]).long(),
    }


def library_inputs(config: Any, batch: Batch, *, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a model that is not in the table: what any takes, and token types where its forward has them.

    Positions are left to the model: counting tokens would silently override whatever it does.

    Raises:
        ModelError: If samples are packed: how such a model would keep conversations apart is not known.
    """
    if batch.attention_mask.ndim == 4:
        raise ModelError(
            f"model_type {config.model_type!r} is not in the table of families (data/families/table.py), and independent "
            "conversations about one picture can share it only where masks and positions are known; give data with "
            "one question a sample"
        )
    kinds = {name: batch.visual_mask.long() for name in _token_types(config)}
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        **kinds,
        **image_tensors(batch, dtype),
    }


def _token_types(config: Any) -> tuple[str, ...]:
    """Names of the arguments by which a model is told which tokens are visual."""
    forward = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].forward
    return tuple(name for name in ("mm_token_type_ids", "token_type_ids") if name in signature(forward).parameters)


def image_tensors(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch's image inputs, floating-point ones in the model's dtype."""
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.image_inputs.items()
    }


def attention_masks(config: Any, batch: Batch) -> Masks:
    """The batch's mask, with sliding windows where a packed batch keeps the library from adding them."""
    if batch.attention_mask.ndim == 2:
        return batch.attention_mask
    return _windowed(config, batch, batch.attention_mask)


def additive_mask(mask: Masks, dtype: torch.dtype) -> Masks:
    """What eager attention adds to its scores for a ready mask; a mask of padding alone is returned as it is."""
    if isinstance(mask, dict):
        return {name: cast("Tensor", additive_mask(part, dtype)) for name, part in mask.items()}
    if mask.ndim != 4:
        return mask
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)


def _windowed(config: Any, batch: Batch, visible: Tensor) -> Masks:
    """A ready mask bool ``[B, 1, T, T]`` as the language model's layers want it.

    The library uses a ready mask for all layers alike, windows or none. Distances are those of positions, so
    that each packed conversation sees as far back as it would alone.
    """
    text = text_config(config)
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ())
    if not window or (kinds and "sliding_attention" not in kinds):
        return visible
    positions = batch.position_ids
    near = visible & (positions[:, None, :, None] - positions[:, None, None, :] < window)
    return {"full_attention": visible, "sliding_attention": near} if kinds else near

"""The first two phases of the built-in teacher: a tower that sees, and a projector that speaks.

Captions alone teach a tower of this size almost nothing in minutes. So the tower first learns, for
every patch, the colour, shape and size of the object in that cell, and the cell's own row and column
(dense labels, which drawn scenes give for free; without the last two it forgets where a patch is).
Then projector and word embeddings learn to name each patch without the language model. After that
the tower is frozen.

easy-vqa has no dense labels, and its shapes span several patches, which the shipped tower, trained on shapes that fit
into one, has never seen: with the language phase alone 56 % of test questions about the shape were right; with a tower
phase first, 93 %. Its train split says what each picture shows ("what shape is in the image?" -> "circle"), so the
tower is first trained to tell those words, on shifted and mirrored pictures.

Dims: B pictures, N visual tokens, D width.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data.sample import Dataset, load_picture
from vlm_distill_cache.data.shapes.dataset import SceneImage
from vlm_distill_cache.data.shapes.scene import CELL, COLORS, GRID, SHAPES, SIZES
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.stage1_teacher.demo.model import WarmCosine

logger = logging.getLogger(__name__)

_NAMES = (COLORS, SHAPES, SIZES)
_TOWER_BATCH, _PROJECTOR_BATCH = 64, 32  # pictures a step
_EMPTY_WEIGHT = 0.15  # of a patch without an object: 33 of 36 patches are empty


def scene_batch(split: str, seed: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``count`` pictures, from that of index ``start`` on, with dense labels.

    Returns:
        Pictures uint8 ``[B, 72, 72, 3]``, and int64 ``[B, N, 3]`` labels of colour, shape and size,
        1-based; 0 in empty cells.
    """
    pictures, labels = [], np.zeros((count, GRID * GRID, len(_NAMES)), np.int64)
    for place in range(count):
        image = SceneImage(split=split, seed=seed, index=start + place)
        pictures.append(image.array())
        for thing in image.scene().objects:
            names = (thing.color, thing.shape, thing.size)
            labels[place, thing.row * GRID + thing.column] = [
                1 + words.index(name) for words, name in zip(_NAMES, names, strict=True)
            ]
    return np.stack(pictures), labels


def normalize_pictures(pictures: np.ndarray, mean: list[float], std: list[float]) -> Tensor:
    """Do what the image processor does to pictures of the right size, for a whole batch at once.

    Args:
        pictures: uint8 ``[B, H, W, 3]``.
        mean: Of each channel, in units of white, as ``std``.
        std: Of each channel.

    Returns:
        float32 ``[B, 3, H, W]``.
    """
    scaled = pictures.astype(np.float32) / np.float32(255)
    scaled -= np.asarray(mean, np.float32)
    scaled /= np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))


def tower_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the patch features the projector reads, ``[B, N, D]``, as the model itself selects them."""
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    features: Tensor = output.hidden_states[model.config.vision_feature_layer][:, 1:]
    return features


def _tower_heads(
    model: LlavaForConditionalGeneration, outputs: int, *, seed: int, rate: float, steps: int
) -> tuple[nn.Linear, WarmCosine]:
    """Linear heads on the tower's features, and an optimizer of both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.Linear(model.config.vision_config.hidden_size, outputs)
    return heads, WarmCosine(nn.ModuleList([model.model.vision_tower, heads]), rate=rate, steps=steps)


def train_tower(
    model: LlavaForConditionalGeneration,
    normalize: Callable[[np.ndarray], Tensor],
    *,
    seed: int,
    steps: int,
) -> dict[str, float]:
    """Train the tower, in place, on dense labels of freshly drawn scenes, 64 pictures a step.

    Returns:
        Share of objects whose colour, shape and size are right on 512 unseen pictures.
    """
    sizes = [len(names) + 1 for names in _NAMES]
    heads, optimizer = _tower_heads(model, sum(sizes) + 2 * GRID, seed=seed, rate=4e-3, steps=steps)
    cell = torch.arange(GRID * GRID)
    for step in range(steps):
        pictures, labels = scene_batch("train", seed, step * _TOWER_BATCH, _TOWER_BATCH)
        named = torch.from_numpy(labels)  # [B, N, 3]
        placed = torch.stack([cell // GRID, cell % GRID], dim=-1).expand(_TOWER_BATCH, -1, -1)  # [B, N, 2]
        target = torch.cat([named, placed], dim=-1)
        scores = heads(tower_features(model, normalize(pictures))).split([*sizes, GRID, GRID], dim=-1)
        weight = (_EMPTY_WEIGHT + (named[..., 0] > 0)).flatten()
        losses = [
            F.cross_entropy(score.flatten(0, 1), target[..., i].flatten(), reduction="none")
            for i, score in enumerate(scores)
        ]
        loss = (torch.stack(losses).sum(0) * weight).sum() / weight.sum()
        optimizer.step(loss)
        if step % 100 == 99:
            logger.info("tower %d/%d: loss %.3f nats a patch", step + 1, steps, loss.item())
    pictures, labels = scene_batch("validation", seed, 0, 512)
    target = torch.from_numpy(labels)
    occupied = target[..., 0] > 0
    with torch.no_grad():
        scores = heads(tower_features(model, normalize(pictures))).split([*sizes, 2 * GRID], dim=-1)
    right = [
        (score.argmax(-1) == target[..., i])[occupied].float().mean().item() for i, score in enumerate(scores[:-1])
    ]
    return dict(zip(("color", "shape", "size"), (round(share, 4) for share in right), strict=True))


def align_projector(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    normalize: Callable[[np.ndarray], Tensor],
    *,
    seed: int,
    steps: int,
) -> float:
    """Train projector and word embeddings to name each patch: colour, shape, size, column and row.

    The language model is skipped: the projected patch meets the (tied) word embeddings directly, so
    visual tokens start out in the space the language model reads. The tower is left alone.

    Returns:
        The last loss, nats a patch.
    """
    embeddings = model.get_input_embeddings()
    projector = model.model.multi_modal_projector
    optimizer = WarmCosine(nn.ModuleDict({"embed": embeddings, "projector": projector}), rate=4e-3, steps=steps)
    word_ids = [torch.tensor(tokenizer.convert_tokens_to_ids(list(names))) for names in _NAMES]
    rows = torch.tensor(tokenizer.convert_tokens_to_ids([f"r{i + 1}" for i in range(GRID)]))
    columns = torch.tensor(tokenizer.convert_tokens_to_ids([f"c{i + 1}" for i in range(GRID)]))
    cell = torch.arange(GRID * GRID)
    value = 0.0
    for step in range(steps):
        pictures, labels = scene_batch("train", seed, step * _PROJECTOR_BATCH, _PROJECTOR_BATCH)
        target = torch.from_numpy(labels)
        with torch.no_grad():
            features = tower_features(model, normalize(pictures))
        log_probs = F.log_softmax(projector(features) @ embeddings.weight.T, dim=-1)  # [B, N, V]
        place = log_probs[:, cell, rows[cell // GRID]] + log_probs[:, cell, columns[cell % GRID]]  # [B, N]
        occupied = target[..., 0] > 0
        named = torch.stack(
            [
                log_probs[occupied].gather(1, ids[target[..., i][occupied] - 1, None])[:, 0]
                for i, ids in enumerate(word_ids)
            ]
        )
        loss = -place.mean() - named.sum(0).mean()
        optimizer.step(loss)
        value = loss.item()
    return value


WORD_GROUPS = (
    ("circle", "rectangle", "triangle"),
    ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)


def answer_labels(dataset: Dataset) -> np.ndarray:
    """Read off each sample's answers which word of each group its picture shows.

    Returns:
        int64 ``[samples, groups]``: place in the group, or `IGNORE_INDEX` where no question asks.
    """
    labels = np.full((len(dataset), len(WORD_GROUPS)), IGNORE_INDEX, np.int64)
    for index in range(len(dataset)):
        for turn in dataset[index].turns:
            for group, words in enumerate(WORD_GROUPS):
                if turn.answer in words:
                    labels[index, group] = words.index(turn.answer)
    return labels


def shift_and_mirror(pixels: Tensor, generator: torch.Generator, reach: int = CELL) -> Tensor:
    """Shift each picture by up to ``reach`` pixels, repeating its border, and mirror half of them.

    Args:
        pixels: float ``[B, 3, H, W]``, as what is returned.
        generator: Consumed.
    """
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    places = torch.randint(0, 2 * reach + 1, (len(pixels), 2), generator=generator).tolist()
    mirrored = (torch.rand(len(pixels), generator=generator) < 0.5).tolist()
    crops = [
        picture[:, top : top + height, left : left + width] for picture, (top, left) in zip(padded, places, strict=True)
    ]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, mirrored, strict=True)])


def train_tower_on_answers(
    model: LlavaForConditionalGeneration,
    encoder: SampleEncoder,
    dataset: Dataset,
    *,
    seed: int,
    steps: int,
) -> float:
    """Train the tower, in place, to tell the words of `WORD_GROUPS` from the mean of its patch features.

    The data set's pictures are held in memory (62 KB each), and 64 of them make a step.

    Returns:
        The last loss, nats a word.
    """
    labels = torch.from_numpy(answer_labels(dataset))
    encoded = [encoder.image_encoder(load_picture(dataset[i].images[0])) for i in range(len(dataset))]
    pictures = torch.from_numpy(np.concatenate([picture.inputs["pixel_values"] for picture in encoded]))
    sizes = [len(words) for words in WORD_GROUPS]
    generator = torch.Generator().manual_seed(seed)
    heads, optimizer = _tower_heads(model, sum(sizes), seed=seed, rate=3e-3, steps=steps)
    value = 0.0
    for step in range(steps):
        chosen = torch.randint(len(dataset), (_TOWER_BATCH,), generator=generator)
        features = tower_features(model, shift_and_mirror(pictures[chosen], generator))  # [B, N, D]
        scores = heads(features.mean(1)).split(sizes, dim=-1)
        losses = [
            F.cross_entropy(score, labels[chosen, group], ignore_index=IGNORE_INDEX)
            for group, score in enumerate(scores)
        ]
        optimizer.step(torch.stack(losses).sum())
        value = torch.stack(losses).mean().item()
        if step % 100 == 99:
            logger.info("tower %d/%d: loss %.3f nats a word", step + 1, steps, value)
    return value

"""A tower for data without dense labels: learn the answers of open questions from the picture alone.

easy-vqa's shapes span several patches, which the shipped tower, trained on shapes that fit into one, has
never seen: with the language phase alone 56 % of test questions about the shape were right; with this
phase first, 93 %. Its train split says what each picture shows ("what shape is in the image?" -> "circle"),
so the tower is first trained to tell those words, on shifted and mirrored pictures.

Dims: B pictures, N visual tokens, D width.
"""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.shapes.scene import CELL
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.stage1_teacher.demo.model import WarmCosine
from vlm_distill_cache.stage1_teacher.demo.vision import tower_features

logger = logging.getLogger(__name__)

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
        reach: Pixels.
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
    batch: int = 64,
    rate: float = 3e-3,
) -> float:
    """Train the tower, in place, to tell the words of `WORD_GROUPS` from the mean of its patch features.

    The data set's pictures are held in memory (62 KB each), and ``batch`` of them make a step.

    Returns:
        The last loss, nats a word.
    """
    labels = torch.from_numpy(answer_labels(dataset))
    pictures = torch.from_numpy(
        np.stack(
            [encoder.image_encoder(dataset[i].images[0].load()).inputs["pixel_values"][0] for i in range(len(dataset))]
        )
    )
    sizes = [len(words) for words in WORD_GROUPS]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.Linear(model.config.vision_config.hidden_size, sum(sizes))
    optimizer = WarmCosine(nn.ModuleList([model.model.vision_tower, heads]), rate=rate, steps=steps)
    value = 0.0
    for step in range(steps):
        chosen = torch.randint(len(dataset), (batch,), generator=generator)
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

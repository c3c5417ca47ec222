"""Built-in teachers: the shipped one for drawn scenes, and training one in minutes on two cores.

The recipe, each phase on what the one before left (seconds on two idle cores in brackets):

1. tower: dense labels a patch, then frozen (`vision.train_tower`, 50)
2. projector and embeddings: name each patch without the language model (`vision.align_projector`, 20)
3. language: first finding objects, then relating them (`language.train_language`, 350)

easy-vqa starts from the shipped teacher: its tower learns the words of the data's own answers
(`vision.train_tower_on_answers`), then phase 3 trains everything.
"""

import logging
import platform
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.atomic import (
    clean_stale,
    create_temporary,
    publish_directory,
    remove,
    write_json_atomic,
)
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.data.builtin import IMAGE_TOKEN, MODEL_MAX_LENGTH, load_image_processor, load_tokenizer
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.shapes.dataset import ShapesDataset, shapes_evaluation
from vlm_distill_cache.data.shapes.scene import GRID
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.templates import TEMPLATES
from vlm_distill_cache.stage1_teacher.demo.language import DRILLS, DrilledScenes, train_language
from vlm_distill_cache.stage1_teacher.demo.model import build_demo_model
from vlm_distill_cache.stage1_teacher.demo.scoring import mean_accuracy, score_model
from vlm_distill_cache.stage1_teacher.demo.vision import (
    align_projector,
    normalize_pictures,
    train_tower,
    train_tower_on_answers,
)

logger = logging.getLogger(__name__)

BUILTIN_DATA = ("shapes", "easy-vqa")
TEMPLATE = "short"
TEST_ITEMS = 300
_OWN_PICTURES = 1_000_003  # added to seeds: no picture of the teacher's training is ever a student's


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """How a built-in teacher is trained.

    Attributes:
        width: Hidden size of both towers.
        layers: Depth of the language model.
        vision_steps: Steps of phase 1 (64 pictures each).
        alignment_steps: Steps of phase 2 (32 pictures each); none for data that start from the shipped teacher.
        language_steps: Steps of phase 3, over all its courses.
        images_per_step: Pictures, with all their conversations, a step of phase 3.
        rate: Peak learning rate of phase 3.
    """

    width: int = 96
    vision_layers: int = 3
    layers: int = 6
    vision_steps: int = 600
    alignment_steps: int = 500
    language_steps: int = 3400
    images_per_step: int = 8
    rate: float = 3e-3


RECIPES = {
    "shapes": DemoRecipe(),
    "easy-vqa": DemoRecipe(vision_steps=500, alignment_steps=0, language_steps=600, rate=1.5e-3),
}


def builtin_teacher_directory() -> Path:
    """Return the shipped teacher of drawn scenes, a directory as ``save_pretrained`` writes it."""
    return Path(__file__).resolve().parent.parent / "builtin"


def demo_teacher_for(data_spec: str, directory: Path) -> Path:
    """Return the built-in teacher for some data; train it first where none is shipped.

    Args:
        data_spec: As ``DATA=``.
        directory: Where a trained teacher is kept; used again if it is there.

    Raises:
        ConfigError: If there is no built-in teacher for such data; names the choices.
    """
    name = _data_name(data_spec)
    if name == "shapes":
        return builtin_teacher_directory()
    if not (directory / "training.json").is_file():
        logger.info("No teacher given and none shipped for %s: training one, kept in %s (minutes)", name, directory)
        train_demo_teacher(data_spec, directory)
    return directory


def build_demo_encoder() -> SampleEncoder:
    """Build the encoder of the built-in models, with the ``short`` template."""
    tokenizer = load_tokenizer()
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=ImageEncoder.from_processor(load_image_processor(), (GRID, GRID)),
        template=TEMPLATES[TEMPLATE],
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        max_length=MODEL_MAX_LENGTH,
    )


def train_demo_teacher(
    data_spec: str, output: Path, *, seed: int = 0, recipe: DemoRecipe | None = None, items: int | None = None
) -> dict[str, Any]:
    """Train a built-in teacher and write it, with its measured accuracy, in one step.

    Args:
        data_spec: ``shapes`` (from scratch) or ``easy-vqa`` (from the shipped teacher), options allowed.
        output: Directory to write; must not exist. It appears only when it is complete.
        seed: Of weights, pictures and order.
        recipe: Default: that of `RECIPES`.
        items: Test items of each kind (shapes), or a tenth of all (other data); default `TEST_ITEMS`.

    Returns:
        What ``training.json`` holds: command, recipe, versions, seconds, parameters, accuracy in percent.

    Raises:
        ConfigError: If the data has no built-in teacher, or ``output`` exists.
    """
    name = _data_name(data_spec)
    recipe = recipe or RECIPES[name]
    items = TEST_ITEMS if items is None else items
    if output.exists():
        raise ConfigError(f"{output} exists; remove it or choose another directory for the teacher")
    output.parent.mkdir(parents=True, exist_ok=True)
    clean_stale(output.parent, output.name)  # of a training killed while it wrote
    seconds: dict[str, float] = {}
    started = time.monotonic()
    encoder = build_demo_encoder()
    if name == "shapes":
        model, vision = _from_scratch(recipe, seed)
        count = recipe.language_steps // len(DRILLS) * recipe.images_per_step  # each drawn picture is seen once
        courses: list[Dataset] = [
            DrilledScenes(ShapesDataset("train", count, seed=seed + place * _OWN_PICTURES), drill)
            for place, drill in enumerate(DRILLS, start=2)
        ]
    else:  # the shipped teacher, whose tower stays trainable
        courses = [open_dataset(data_spec, split="train")]
        model = LlavaForConditionalGeneration.from_pretrained(builtin_teacher_directory(), dtype=torch.float32)
        loss = train_tower_on_answers(model.train(), encoder, courses[0], seed=seed, steps=recipe.vision_steps)
        vision = {"loss": round(loss, 4)}
    seconds["vision"] = round(time.monotonic() - started, 1)

    started = time.monotonic()
    for dataset in courses:
        logger.info("language: %s", dataset.name)
        train_language(
            model,
            encoder,
            dataset,
            steps=recipe.language_steps // len(courses),
            images_per_step=recipe.images_per_step,
            rate=recipe.rate,
            seed=seed,
        )
    seconds["language"] = round(time.monotonic() - started, 1)

    model = model.half().float().eval().requires_grad_(False)  # as it will be written
    started = time.monotonic()
    if name == "shapes":
        test = shapes_evaluation("test", items, seed=seed + _OWN_PICTURES)
    else:
        test = open_evaluation(data_spec, "test", 10 * items)
    scores = score_model(model, encoder, test)
    seconds["scoring"] = round(time.monotonic() - started, 1)
    record = {
        "command": f"teacher-cache demo-teacher --data {data_spec} --seed {seed}",
        "data": data_spec,
        "seed": seed,
        "template": TEMPLATE,
        "recipe": asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "vision_accuracy": vision,
        "accuracy": {**scores, "mean": mean_accuracy(scores)},
    }
    _write_teacher(model, encoder, record, output)
    logger.info("teacher %s: %s", output, record["accuracy"]["mean"])
    return record


def _from_scratch(recipe: DemoRecipe, seed: int) -> tuple[LlavaForConditionalGeneration, dict[str, float]]:
    """Phases 1 and 2 on drawn scenes; the tower comes back frozen."""
    tokenizer, processor = load_tokenizer(), load_image_processor()
    model = build_demo_model(
        tokenizer, seed=seed, width=recipe.width, vision_layers=recipe.vision_layers, layers=recipe.layers
    )
    normalize = partial(normalize_pictures, mean=processor.image_mean, std=processor.image_std)
    accuracy = train_tower(model, normalize, seed=seed, steps=recipe.vision_steps)
    align_projector(model, tokenizer, normalize, seed=seed + _OWN_PICTURES, steps=recipe.alignment_steps)
    model.model.vision_tower.requires_grad_(False)
    return model, accuracy


def _write_teacher(
    model: LlavaForConditionalGeneration, encoder: SampleEncoder, record: dict[str, Any], output: Path
) -> None:
    """Write weights (fp16), processor files and record to a temporary directory, then rename it."""
    temporary, lock = create_temporary(output, directory=True)
    try:
        model.half().save_pretrained(temporary)
        for weights in temporary.glob("*.safetensors"):
            weights.chmod(0o644)  # the library leaves 0600, but teams share directories
        encoder.tokenizer.save_pretrained(temporary)
        encoder.image_encoder.processor.save_pretrained(temporary)
        write_json_atomic(temporary / "training.json", record)
        publish_directory(temporary, output)
    finally:
        remove(temporary)
        if lock is not None:
            lock.release()


def _data_name(data_spec: str) -> str:
    name = data_spec.partition(":")[0]
    if name not in BUILTIN_DATA:
        raise ConfigError(
            f"there is no built-in teacher for data {data_spec!r}; give a checkpoint "
            f"directory ({by_make('TEACHER=PATH', '--teacher PATH')}), or use data that has one: {', '.join(BUILTIN_DATA)}"
        )
    return name

"""Pictures of many shapes with questions about them, and caches that teachers of every family build from them."""

import json
from pathlib import Path

import numpy as np
import PIL.Image

from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract

SIZES = ((40, 30), (24, 60), (33, 33), (100, 20), (24, 24), (17, 50), (64, 48), (30, 31))


def write_data(folder: Path) -> Path:
    """Eight pictures of eight shapes, two conversations about the first, and one without a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{index}.png")
        entries.append(entry(f"s{index}", f"{index}.png", "<image>\nWhat is it?", "A dog"))
    entries.append(entry("again", "0.png", "<image>\nIs it red?", "No."))
    entries.append(entry("text", None, "Is water wet?", "Yes"))
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


def entry(name: str, image: str | None, question: str, answer: str) -> dict:
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": talk} | ({} if image is None else {"image": image})


def build(teacher: Path, data: Path, target: Path, **options):
    settings = {"batch_size": 4, "shard_size": 6, "fidelity_samples": 2, "dtype": "float32"} | options
    extract(BuildConfig(cache=str(target), teacher=str(teacher), data=str(data), **settings))
    return open_cache(target)

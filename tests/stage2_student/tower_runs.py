"""A run that trains a vision tower on data of which every other sample has no picture."""

import json
from pathlib import Path

import PIL.Image
import train_runs
from tiny_cache import build_tiny_cache

from vlm_distill_cache.data.registry import open_dataset

LOSSES = {"logits": 1.0, "answer_attention": 1.0, "visual_map": 0.5}
TOWER = {
    "phases": ["dft"],
    "dft": {"steps": 4, "batch_size": 6, "trainable": "tower", "tower_lr": 1e-3, "projector_lr": 5e-4, "losses": LOSSES},
}  # fmt: skip


def mixed_cache(folder: Path) -> Path:
    """A folder with data of which every other sample is text alone, and a cache of them."""
    folder.mkdir()
    entries = []
    for index in range(10):
        turns = [("human", "what color is the circle ?"), ("gpt", ("red", "blue")[index % 2])]
        entry = {"id": str(index), "conversations": [{"from": who, "value": text} for who, text in turns]}
        if index % 2:
            PIL.Image.new("RGB", (40, 40), (20 * index, 90, 10)).save(folder / f"{index}.png")
            entry["image"] = f"{index}.png"
        entries.append(entry)
    (folder / "data.json").write_text(json.dumps(entries))
    build_tiny_cache(folder / "cache", dataset=open_dataset(str(folder / "data.json")))
    return folder


def make_config(mixed: Path, output: Path, **changes):
    """Micro-batches of one sample: in each some process has text alone."""
    dft = TOWER["dft"] | {"batch_size": 4, "micro_batch_size": 1}
    options = TOWER | {"dft": dft, "data": str(mixed / "data.json")}
    return train_runs.make_config(mixed / "cache", output, **options | changes)

"""What a picture costs to read, decoded or kept, and what a build's memory has to do with the size of its shards.

    .venv/bin/python -m tests.benchmarks.bench_pixels    # writes results/bench_pixels.json and docs/results.md; some minutes

Milliseconds are of the processor, not of the clock, of one sample from its picture's file to the batch; the ways of reading
take turns. A build's peak of memory is that of a process of its own, for as many samples in small shards and in one. ``As
before``: pixels as float32, all of a shard in memory.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers

from tests.benchmarks.bench_docs import ROOT, TABLE_PAGE, table_in
from tests.benchmarks.bench_measure import Spread
from tests.benchmarks.bench_results import describe_machine, rounded
from vlm_distill_cache.data.builtin import load_image_processor, load_tokenizer
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.images.layouts.any_resolution import AnyResolutionEncoder
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.shapes.dataset import ShapesDataset
from vlm_distill_cache.data.text import media
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.pixel_cache import PixelCache
from vlm_distill_cache.data.text.templates import get_template
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.loop import spool

STORED = Path(__file__).parent / "results" / "bench_pixels.json"
BEGIN, END = "<!-- bench-pixels -->\n", "<!-- /bench-pixels -->\n"
PICTURES, ROUNDS = 8, 3
SIDE, SAMPLES, SHARDS = 336, 1024, (64, 1024)


def write_photo(path: Path, seed: int, size: tuple[int, int] = (640, 480)) -> ImageFile:
    """A JPEG of smooth colours with a little noise, as large as a photograph's."""
    generator = np.random.default_rng(seed)
    colours = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    smooth = np.asarray(PIL.Image.fromarray(colours).resize(size, PIL.Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(smooth + generator.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    PIL.Image.fromarray(noisy).save(path, quality=90)
    return ImageFile(path)


def sample_encoder(image_encoder: Any) -> SampleEncoder:
    """The built-in tokenizer with an image encoder."""
    tokenizer = load_tokenizer()
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=image_encoder,
        template=get_template("short"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        max_length=8192,
    )


def processor_ms(calls: dict[str, Callable[[], Any]], count: int) -> dict[str, Spread]:
    """Milliseconds of the processor that each call takes for one of ``count`` samples; calls take turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            began = time.thread_time()
            call()
            if turn:
                found[name].append(1e3 * (time.thread_time() - began) / count)
    return {name: Spread.of(values) for name, values in found.items()}


def read_samples(name: str, encoder: SampleEncoder, samples: list[Sample], folder: Path) -> dict[str, Any]:
    """One sample from file to batch: decoded, kept for the first time, kept before, and held in memory."""
    kept, number = PixelCache(), iter(range(1000))
    kept.open(folder / "kept", 1 << 40)

    def anew() -> None:
        cache = PixelCache()
        cache.open(folder / f"anew{next(number)}", 1 << 40)
        batches(replace(encoder, pixels=cache))

    def batches(reader: SampleEncoder) -> None:
        for sample in samples:
            collate([reader(sample)], 0)

    held = [encoder(sample) for sample in samples]
    calls: dict[str, Callable[[], Any]] = {
        "decoded": lambda: batches(encoder),
        "kept for the first time": anew,
        "kept before": lambda: batches(replace(encoder, pixels=kept)),
        "held in memory": lambda: [collate([sample], 0) for sample in held],
    }
    found = processor_ms(calls, len(samples))
    bytes_kept = sum(path.stat().st_size for path in (folder / "kept").iterdir())
    print(name, {way: round(spread.median, 2) for way, spread in found.items()}, bytes_kept // len(samples), flush=True)
    return {
        "ms": {way: rounded(spread.median) for way, spread in found.items()},
        "spreads": {way: [rounded(spread.lowest), rounded(spread.highest)] for way, spread in found.items()},
        "bytes_kept": bytes_kept // len(samples),
    }


def bench_reading(folder: Path) -> dict[str, Any]:
    """Drawn pictures, and photographs as two families read them."""
    turn = Turn(question="What is it?", answer="a red circle")
    photos = [write_photo(folder / f"{number}.jpg", number) for number in range(PICTURES)]
    asked = [Sample(sample_id=str(n), images=(photo,), turns=(turn,)) for n, photo in enumerate(photos)]
    drawn = ShapesDataset("train", PICTURES)
    clip = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True
    )
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    near = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints
    )
    cases = {
        "shapes, 72 x 72 (drawn: not kept)": (
            ImageEncoder.from_processor(load_image_processor(), (6, 6)),
            [drawn[n] for n in range(PICTURES)],
        ),
        "JPEG 640 x 480, CLIP 336 padded": (ImageEncoder(processor=clip, layout="pad", grid=(24, 24)), asked),
        "JPEG 640 x 480, LLaVA-NeXT": (AnyResolutionEncoder(processor=near, patch_size=14), asked),
    }
    found = {}
    for number, (name, (images, samples)) in enumerate(cases.items()):
        (folder / str(number)).mkdir()
        found[name] = read_samples(name, sample_encoder(images), samples, folder / str(number))
    return found


def write_teacher(folder: Path) -> Path:
    """A tiny random LLaVA that reads pictures of 336 pixels a side."""
    tokenizer = load_tokenizer()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=56
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=512,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    transformers.CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False).save_pretrained(folder)
    return folder


def build(folder: Path, shard_size: int, as_before: bool, told: Connection) -> None:
    """Build a cache of the folder's data in this process, and tell the peak of its memory, bytes."""
    if as_before:
        vars(media)["as_bytes"] = lambda *_: None
        vars(spool)["IN_MEMORY"] = SAMPLES
    options: dict[str, Any] = {"batch_size": 8, "threads": 1, "fidelity_samples": 0, "num_workers": 0, "limit": 0}
    extract(
        BuildConfig(
            cache=str(folder / f"{shard_size}{as_before}"), teacher=str(folder / "teacher"), data=str(folder / "data.json"),
            template="short", signals=("logits",), device="cpu", shard_size=shard_size, **options,
        )
    )  # fmt: skip
    told.send(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def bench_building(folder: Path) -> dict[str, Any]:
    """Peaks of memory, bytes, by the size of shards."""
    write_teacher(folder / "teacher")
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    talk = [{"from": "human", "value": "<image>\nwhat is it ?"}, {"from": "gpt", "value": "a red circle"}]
    entries = [{"id": str(n), "image": f"{n % 8}.png", "conversations": talk} for n in range(SAMPLES)]
    (folder / "data.json").write_text(json.dumps(entries))
    fork = multiprocessing.get_context("fork")  # libraries are there, and no thread of theirs has run
    started = {}
    for way in ("as before", "now"):
        for shard_size in SHARDS:
            here, there = fork.Pipe(duplex=False)
            fork.Process(target=build, args=(folder, shard_size, way == "as before", there)).start()
            there.close()
            started[way, shard_size] = here
    found: dict[str, Any] = {}
    for (way, shard_size), here in started.items():
        found.setdefault(way, {})[str(shard_size)] = here.recv()
        print(way, shard_size, found[way], flush=True)
    return {"samples": SAMPLES, "peak_bytes_by_shard_size": found}


def tables(stored: dict[str, Any]) -> str:
    """What was measured as the page shows it: reading, and peaks of memory."""
    machine, reading, building = stored["machine"], stored["reading"], stored["building"]
    ways = list(next(iter(reading.values()))["ms"])
    lines = [
        f"| ms of one core a sample; {machine['processor']} | " + " | ".join(ways) + " | KB on disk |",
        "|---" * (len(ways) + 2) + "|",
        *(
            f"| {name} | "
            + " | ".join(f"{found['ms'][way]:.1f}" for way in ways)
            + f" | {found['bytes_kept'] / 1e3:,.0f} |"
            for name, found in reading.items()
        ),
        "",
        f"| peak memory of a build of {building['samples']:,} samples, MB | "
        + " | ".join(f"shards of {size:,}" for size in SHARDS)
        + " |",
        "|---" * (len(SHARDS) + 1) + "|",
        *(
            f"| {way} | " + " | ".join(f"{peaks[str(size)] / 1e6:,.0f}" for size in SHARDS) + " |"
            for way, peaks in building["peak_bytes_by_shard_size"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, store, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", choices=("reading", "building"), help="measure one part; the other stays as it is stored"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts = {"reading": bench_reading, "building": bench_building}
    for name in [given.only] if given.only else parts:
        with tempfile.TemporaryDirectory() as folder:
            measured = parts[name](Path(folder))
        stored = json.loads(STORED.read_text()) if STORED.is_file() else {}
        stored |= {"machine": describe_machine(), name: measured}
        STORED.write_text(json.dumps(stored, indent=1) + "\n")
    page = ROOT / TABLE_PAGE
    text = page.read_text()
    page.write_text(text.replace(BEGIN + table_in(text, BEGIN, END) + END, BEGIN + tables(stored) + END))


if __name__ == "__main__":
    main()

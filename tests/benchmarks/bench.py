"""Speed and size, as ratios measured side by side in one run: ``make bench``.

Every ratio is the median over interleaved repetitions (A B A B ...), so that a machine whose speed drifts
slows both sides alike. The result is stored beside this file with the machine and the versions.
"""

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import zarr
from transformers import LlamaConfig, LlamaModel

from common.cache import open_cache
from common.codecs.logits import LogitCodec
from common.codecs.row_attention import RowAttention, RowAttentionCodec
from common.conversion import convert
from common.manifest import SHARDS
from common.visual_attention import AttentionCapture, AttentionRequest
from stage1_teacher.config import BuildConfig
from stage1_teacher.extract import extract
from stage2_student.run import set_up_libraries
from stage2_student.sampler import epoch_order
from stage2_student.train import train_student
from tests.benchmarks.bench_scale import bench_scale

STORED = Path(__file__).parent / "results" / "bench.json"


def paired(first: Callable[[], Any], second: Callable[[], Any], *, rounds: int = 7) -> tuple[float, float]:
    """Median seconds of both, run in turn after one warm-up each."""
    first(), second()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, kept in zip((first, second), seconds, strict=True):
            started = time.perf_counter()
            call()
            kept.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def bench_capture() -> dict[str, float]:
    """A 16-layer model of width 512, 700 tokens, 50 answer rows: capture and eager against plain SDPA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=16, num_attention_heads=8, vocab_size=1000
    )  # fmt: skip
    model = LlamaModel._from_config(config, attn_implementation="sdpa").eval()
    eager = LlamaModel._from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(0, 1000, (1, 700))
    request = AttentionRequest(
        torch.arange(640, 690)[None], torch.arange(20, 596)[None], (tuple(range(5, 11)),)
    )
    capture = AttentionCapture(model)

    def plain() -> None:
        with torch.inference_mode():
            model(ids, use_cache=False)

    def captured() -> None:
        with torch.inference_mode(), capture.record({"answer": request}):
            model(ids, use_cache=False)

    def slow() -> None:
        with torch.inference_mode():
            eager(ids, use_cache=False, output_attentions=True)

    base, with_capture = paired(plain, captured)
    again, attentions = paired(captured, slow)
    return {
        "capture / bare forward": with_capture / base,
        "eager output_attentions / capture": attentions / again,
    }


def bench_codecs() -> dict[str, float]:
    """Thousand rows a second on one core, records of 100 rows, synthetic 32k-vocabulary teacher."""
    torch.manual_seed(0)
    codec = LogitCodec.from_preset("default")
    sparse = codec.select(torch.randn(100, 32_000) * 4, torch.randint(0, 32_000, (100,)))
    cells = torch.rand(100, 1, 144) ** 8
    rows = RowAttentionCodec(grid=(12, 12), groups=1)
    attention = RowAttention.from_cells(cells / cells.sum(-1, keepdim=True) * 0.4)
    figures = {}
    for name, which, value in (("logit", codec, sparse), ("answer attention", rows, attention)):
        record = which.encode(value)  # type: ignore[arg-type]
        encode, decode = paired(
            lambda w=which, v=value: w.encode(v), lambda w=which, r=record: w.decode(r), rounds=51
        )  # type: ignore[misc]
        figures[f"{name} encode, thousand rows/s"] = 0.1 / encode
        figures[f"{name} decode, thousand rows/s"] = 0.1 / decode
    return figures


def bench_cache(folder: Path) -> tuple[dict[str, float], Path]:
    """Stage one on built-in data."""
    cache_dir = folder / "cache"
    summary = extract(BuildConfig(cache=str(cache_dir), fidelity_samples=0))
    totals = summary.manifest.totals
    return {
        "stored bytes / row": totals["bytes"] / totals["rows"],
        "stored bytes / sample": totals["bytes"] / totals["samples"],
        "stage one, samples/s": summary.samples / summary.seconds,
    }, cache_dir


def bench_reading(cache_dir: Path, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """An epoch of training's reads, opening and checking included, against zarr-python's per-record random reads."""
    tars = folder / "tars"
    convert(cache_dir, tars, "webdataset")
    cache = open_cache(cache_dir)
    ids, shards = list(cache.sample_ids), range(cache.plan.shard_count)
    starts = np.cumsum([0, *(shard.samples for shard in cache.manifest.shards)])
    blocks = [np.arange(starts[shard], starts[shard + 1]) for shard in shards]
    order = [ids[i] for i in epoch_order(blocks, seed=0, epoch=0, window=2).tolist()]
    names = [field.name for field in cache.plan.all_fields]
    groups = [zarr.open_group(str(cache_dir / SHARDS / f"{shard:05d}.zarr"), mode="r") for shard in shards]
    offsets = [{name: group[f"{name}_offsets"][:] for name in names} for group in groups]
    places = [(shard, i) for shard, block in enumerate(blocks) for i in range(len(block))]
    chosen = [places[i] for i in np.random.default_rng(0).permutation(len(places))[:64].tolist()]

    def epoch(path: Path) -> None:
        opened = open_cache(path, open_shards=4)
        for sample_id in order:
            opened.read(sample_id)

    def theirs() -> None:
        for shard, i in chosen:
            for name, bounds in offsets[shard].items():
                groups[shard][name][bounds[i] : bounds[i + 1]]

    ratios, figures = {}, {}
    for store, path in (("zarr", cache_dir), ("tar", tars)):
        fast, slow = paired(lambda path=path: epoch(path), theirs, rounds=3)  # type: ignore[misc]
        ratios[f"{store}, block-shuffled / zarr-python, per record"] = (len(order) / fast) / (64 / slow)
        figures[f"{store}, block-shuffled, thousand samples/s"] = len(order) / fast / 1e3
    return ratios, figures


def bench_training(
    cache: Path, folder: Path, *, rounds: int = 3, steps: int = 60
) -> tuple[dict[str, float], dict[str, float]]:
    """Median step of each loss combination against plain fine-tuning, runs in turn."""
    arms = {
        "SFT": {"lm": 1.0},
        "logits": {"lm": 1.0, "logits": 1.0},
        "logits + answer attention": {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0},
    }
    medians: dict[str, list[float]] = {name: [] for name in arms}
    waits: list[float] = []
    for _ in range(rounds):
        for name, losses in arms.items():
            shutil.rmtree(folder / "run", ignore_errors=True)
            result = train_student(
                student="mobilevlm-tiny", data="shapes", cache=str(cache), output=str(folder / "run"),
                phases=["dft"], dft={"steps": steps, "losses": losses}, max_length=512,
            )  # fmt: skip
            records = result.log[steps // 3 :]
            medians[name].append(statistics.median(record["step_s"] for record in records))
            waits.append(100 * statistics.mean(record["data_wait"] for record in records))
    ratios = {
        f"step: {name} / SFT": statistics.median(
            with_losses / plain for with_losses, plain in zip(times, medians["SFT"], strict=True)
        )
        for name, times in medians.items()
        if name != "SFT"
    }
    return ratios, {"data_wait, %": statistics.median(waits)}


def main() -> None:
    """Measure, print and store."""
    set_up_libraries()
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        stored, cache = bench_cache(folder)
        codecs = bench_codecs()
        for more, numbers in (
            ({}, stored | codecs),
            (bench_capture(), {}),
            bench_reading(cache, folder),
            bench_scale(folder / "scale"),
            bench_training(cache, folder),
        ):
            ratios |= more
            figures |= numbers
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "zarr": zarr.__version__,
    }
    results = {
        kind: {name: float(f"{value:.4g}") for name, value in values.items()}
        for kind, values in (("ratios", ratios), ("figures", figures))
    }
    STORED.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")
    for values in results.values():
        for name, value in values.items():
            sys.stdout.write(f"| {name} | {value:g} |\n")


if __name__ == "__main__":
    main()

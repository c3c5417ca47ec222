"""Bytes of the built-in cache, speed of its codecs and readers. Part of ``make bench``."""

from pathlib import Path

import numpy as np
import torch
import zarr
from numcodecs import zstd

from tests.benchmarks.bench_measure import Seconds, Spread, Values, paired_seconds, ratio, scaled
from vlm_distill_cache.common.cache.plan import SHARDS
from vlm_distill_cache.common.codecs.live import RowAttention, as_tensors, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.convert import convert
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage2_student.batches.sampler import epoch_order

RANDOM_READS = 64


def build_builtin_cache(folder: Path, *, limit: int = 0) -> tuple[Values, Path]:
    """Stage one on built-in data, with one thread.

    Returns:
        Figures, and the cache.
    """
    cache = folder / "cache"
    summary = extract(BuildConfig(cache=str(cache), fidelity_samples=0, threads=1, limit=limit))
    assert summary.manifest is not None
    totals = summary.manifest.totals
    return {
        "stored bytes / row": totals["bytes"] / totals["rows"],
        "stored bytes / sample": totals["bytes"] / totals["samples"],
    }, cache


def bench_codecs(*, rounds: int = 51) -> tuple[Values, Values]:
    """Thousand rows a second on one core, records of 100 rows, synthetic 32k-vocabulary teacher; and what bounds them.

    A decoder has at least the work of zstd, which a tar's records pass through; a selection at least the exponentials of three
    sums over the vocabulary: of the normaliser, and of what is not kept at each of two temperatures.
    """
    torch.manual_seed(0)
    codec = LogitCodec.from_preset("default")
    dense, labels = torch.randn(100, 32_000) * 4, torch.randint(0, 32_000, (100,))
    sparse = select_entries(codec, dense, labels)
    cells = torch.rand(100, 1, 144) ** 8
    rows = RowAttentionCodec(grid=(12, 12), groups=1)
    attention = RowAttention.from_cells(cells / cells.sum(-1, keepdim=True) * 0.4)
    encoded, encoded_rows = codec.encode(sparse), rows.encode(attention)
    plain = b"".join(array.tobytes() for array in encoded.values())
    frame, powers = zstd.compress(plain, 9), torch.empty(16, dense.shape[1])

    def exponentials() -> None:
        for part in dense.split(len(powers)):
            for _ in range(3):
                torch.exp(part, out=powers[: len(part)])

    seconds = paired_seconds(
        {
            "logit encode": lambda: codec.encode(sparse),
            "logit decode": lambda: as_tensors(codec.decode(encoded)),
            "answer attention encode": lambda: rows.encode(attention),
            "answer attention decode": lambda: as_tensors(rows.decode(encoded_rows)),
            "zstd alone, of the same rows": lambda: zstd.decompress(frame),
        },
        rounds=rounds,
    )
    seconds |= paired_seconds(
        {
            "select top-k of 32k logits": lambda: select_entries(codec, dense, labels),
            "three exponentials of 32k logits": exponentials,
        },
        rounds=max(1, rounds // 5),
    )
    ratios: Values = {
        "logit decode / zstd alone": ratio(seconds["logit decode"], seconds["zstd alone, of the same rows"]),
        "select top-k / its exponentials": ratio(
            seconds["select top-k of 32k logits"], seconds["three exponentials of 32k logits"]
        ),
    }
    figures = {f"{name}, thousand rows/s": Spread.of(0.1 / spent for spent in times) for name, times in seconds.items()}
    return ratios, dict(figures)


def bench_readers(cache_dir: Path, folder: Path, *, rounds: int = 7) -> tuple[Values, Values]:
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
    chosen = [places[i] for i in np.random.default_rng(0).permutation(len(places))[:RANDOM_READS].tolist()]

    def epoch(path: Path) -> None:
        opened = open_cache(path, open_shards=4)
        for sample_id in order:
            opened.read(sample_id)

    def theirs() -> None:
        for shard, i in chosen:
            for name, bounds in offsets[shard].items():
                groups[shard][name][bounds[i] : bounds[i + 1]]

    seconds = paired_seconds(
        {"zarr": lambda: epoch(cache_dir), "tar": lambda: epoch(tars), "theirs": theirs}, rounds=rounds
    )
    ratios: Values = {}
    figures: Values = {}
    for store in ("zarr", "tar"):
        speeds = [len(order) / spent for spent in seconds[store]]
        ratios[f"{store}, block-shuffled / zarr-python, per record"] = ratio(
            [Seconds(spent / RANDOM_READS, spent.cpu / RANDOM_READS) for spent in seconds["theirs"]],
            [Seconds(spent / len(order), spent.cpu / len(order)) for spent in seconds[store]],
        )
        figures[f"{store}, block-shuffled, thousand samples/s"] = scaled(1e-3, Spread.of(speeds))
    return ratios, figures

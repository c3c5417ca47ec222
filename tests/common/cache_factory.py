"""Small caches for the storage tests: every axis, every dtype, text-only and failed samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlm_distill_cache.common.cache.manifest import Manifest, seal
from vlm_distill_cache.common.cache.plan import Plan, write_plan
from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.quantise import GAP_TABLE
from vlm_distill_cache.common.codecs.visual_map import VisualMapCodec

FIELDS = {
    "logits": (
        Field(name="entry_count", dtype="u1", axis="row"),
        Field(name="token_ids", dtype="u4", axis="entry"),
        Field(name="log_gap", dtype="u1", axis="entry"),
        Field(name="top_logprob", dtype="f2", axis="row"),
        Field(name="tail_logmass", dtype="f2", axis="row", trailing=(2,)),
    ),
    "visual_map": (
        Field(name="visual_columns", dtype="f4", axis="visual", trailing=(2,)),
        Field(name="visual_map", dtype="u1", axis="pair", trailing=(2,)),
    ),
}
SIGNALS = {
    "logits": LogitCodec(floor=0.001, min_k=1, max_k=64).to_dict(),
    "visual_map": VisualMapCodec(groups=2).to_dict(),
}
FAILED = 3  # the position of the sample that cannot be read


def make_plan(store: str = "zarr", *, samples: int = 10, shard_size: int = 4, **changes: object) -> Plan:
    values = {
        "store": store,
        "sample_count": samples,
        "shard_size": shard_size,
        "signals": SIGNALS,
        "fields": FIELDS,
        "fingerprints": {"teacher": "a" * 32, "data": "b" * 32},
        "teacher": {"name": "tiny", "family": "llava", "vocabulary": 100},
        "data": {"name": "made up", "split": "train"},
    }
    return Plan(**(values | changes))  # type: ignore[arg-type]


def sample_id(position: int) -> str:
    return f"set/é.{position}"


def make_record(position: int) -> Record:
    rng = np.random.default_rng(position)
    rows = 0 if position == 1 else int(rng.integers(1, 9))
    labels = rng.integers(0, 100, rows).astype(np.uint32)
    counts = rng.integers(1, 6, rows).astype(np.uint8)
    gaps = _gaps(rng, counts)
    tail = 0.1 + 0.8 * rng.random(rows)  # mass of all other tokens
    kept, roots = (
        np.array([np.exp(-GAP_TABLE[part] / t).sum() for part in np.split(gaps, np.cumsum(counts)[:-1])])[:rows]
        for t in (1, 2)
    )
    warm = np.sqrt(tail * 2**32)  # at temperature 2, if the tail is of all ids that there are
    warm /= warm + roots * np.sqrt((1 - tail) / kept)
    visual = 0 if position == 2 else int(rng.integers(1, 7))  # a text-only sample
    return {
        "image_hash": rng.integers(0, 256, (1, 16)).astype(np.uint8),
        "labels": labels,
        "tiles": np.array([[1, visual, 0, 0, 1, 1]], np.float32)[: min(visual, 1)],
        "entry_count": counts,
        "token_ids": _token_ids(labels, counts),
        "log_gap": gaps,
        "top_logprob": np.log((1 - tail) / kept).astype(np.float16),
        "tail_logmass": np.log(np.stack([tail, warm], axis=1)).astype(np.float16),
        "visual_columns": (rng.random((visual, 2)) / max(visual, 1)).astype(np.float32),
        "visual_map": rng.integers(0, 221, (visual * (visual + 1) // 2, 2)).astype(np.uint8),  # at most 1/6 each
    }


def _token_ids(labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Different tokens in each row, the ground truth among them."""
    rows = [(label + np.arange(count)) % 100 for label, count in zip(labels, counts, strict=True)]
    return np.concatenate([np.zeros(0), *rows]).astype(np.uint32)


def _gaps(rng: np.random.Generator, counts: np.ndarray) -> np.ndarray:
    """Codes by rank: 0 first, then rising."""
    rows = [np.sort(np.append(0, rng.integers(0, 255, count - 1))) for count in counts]
    return np.concatenate([np.zeros(0), *rows]).astype(np.uint8)


def build_shard(cache_dir: Path, plan: Plan, index: int) -> None:
    writer = open_writer(plan.store, cache_dir, index, plan.all_fields)
    failed = []
    try:
        for position in plan.shard_range(index):
            if position == FAILED:
                failed.append((sample_id(position), "image is truncated"))
            else:
                record = make_record(position)
                writer.append(sample_id(position), {f.name: record[f.name] for f in plan.all_fields})
        finish_shard(writer, failed)
    finally:
        writer.abort()


def build_cache(cache_dir: Path, plan: Plan, fidelity: dict[str, object] | None = None) -> Manifest:
    write_plan(cache_dir, plan)
    for index in range(plan.shard_count):
        build_shard(cache_dir, plan, index)
    (cache_dir / "processor").mkdir()
    (cache_dir / "processor" / "note.json").write_text("{}\n")
    return seal(cache_dir, fidelity=fidelity)


def tree(root: Path) -> dict[str, bytes]:
    """All files below a folder, by relative path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def assert_equal_records(found: Record, expected: Record) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name

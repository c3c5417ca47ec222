"""The figures of `make distill STUDENT=mobilevlm` over several seeds: how much of them is one run's luck?

    .venv/bin/python -m tests.benchmarks.demonstration    # about three minutes a seed on 2 cores

Runs what the target runs, once for each seed of students and of their data's order; teacher, cache and items are the same.
What is done stays in ``build/demonstration``: a killed run goes on, the others are not run again. Stores the scores and
writes the table of docs/results.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_docs import table_in
from tests.benchmarks.experiment_seeds import write_stored
from tests.benchmarks.experiment_tables import interval

STORED = Path(__file__).parent / "results" / "demonstration_seeds.json"
BEGIN, END = "<!-- demonstration-seeds -->\n", "<!-- /demonstration-seeds -->\n"
SEEDS = (0, 1, 2, 3, 4)  # the first is the demonstration's own
MODELS = {"sft": "without a teacher", "distilled": "distilled"}
MEASURES = {
    "likelihood": "captions by likelihood, %",
    "questions": "questions, exact match, %",
    "teacher/top1": "top-1 agrees with teacher, %",
}


def run_seed(root: Path, seed: int) -> dict[str, Any]:
    """Train, score and report both students of one seed, or find them done.

    Returns:
        The seed, and each student's scores as shares of 1, by measure and ``measure/kind``.
    """
    distill, output = Path(sys.executable).with_name("distill"), root / f"run-{seed}"
    command = [distill, "run", "--student", "mobilevlm", "--cache", root / "cache", "--output", output]
    subprocess.run([*command, "--set", f"seed={seed}"], check=True)
    found = json.loads((output / "evaluation.json").read_text())
    scores = {model: {name: score["value"] for name, score in found[model]["scores"].items()} for model in MODELS}
    return {"seed": seed, "scores": scores}


def tables(stored: Mapping[str, Any]) -> str:
    """Means with 95 % intervals over seeds, gains paired by seed, and every seed's captions; empty without results."""
    results = stored["results"]
    if not results:
        return ""

    def of(result: Mapping[str, Any], model: str, name: str) -> float:
        return 100 * float(result["scores"][model][name])

    seeds = ", ".join(str(result["seed"]) for result in results)
    lines = [f"| seeds {seeds} | {' | '.join(MODELS.values())} | gain, points | by seed |", "|---|---|---|---|---|"]
    for name, title in MEASURES.items():
        cells = ["{:.1f} ± {:.1f}".format(*interval([of(r, model, name) for r in results])) for model in MODELS]
        gains = [of(r, "distilled", name) - of(r, "sft", name) for r in results]
        by_seed = ", ".join(f"{gain:+.1f}" for gain in gains)
        lines.append(f"| {title} | {' | '.join(cells)} | {'{:+.1f} ± {:.1f}'.format(*interval(gains))} | {by_seed} |")
    kinds = sorted(name for name in results[0]["scores"]["sft"] if name.startswith("likelihood/"))
    lines += ["", f"| captions by kind, % | {' | '.join(MODELS.values())} |", "|---|---|---|"]
    for kind in kinds:
        means = [statistics.mean(of(result, model, kind) for result in results) for model in MODELS]
        lines.append(f"| {kind.partition('/')[2]} | {means[0]:.1f} | {means[1]:.1f} |")
    return "\n".join([*lines, ""])


def write_page(page: Path, stored: Mapping[str, Any]) -> None:
    """Put the tables between the marks of a page."""
    text = page.read_text()
    page.write_text(text.replace(BEGIN + table_in(text, BEGIN, END) + END, BEGIN + tables(stored) + END))


def main() -> None:
    """Run what is missing, store the scores, write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="Only the first so many seeds.")
    arguments = parser.parse_args()
    root = Path("build/demonstration")
    subprocess.run([Path(sys.executable).with_name("teacher-cache"), "build", "--cache", root / "cache"], check=True)
    results = [run_seed(root, seed) for seed in SEEDS[: arguments.seeds]]
    stored = {"command": "distill run --student mobilevlm --set seed=SEED", "results": results}
    write_stored(stored, STORED)
    write_page(Path("docs/results.md"), stored)
    sys.stdout.write(tables(stored))


if __name__ == "__main__":
    main()

"""The ablation on built-in data: which teacher signal helps a student, at equal data, steps and seeds.

    make experiment          # builds the cache, trains every arm for every seed, prints and stores the tables

Arms differ in their losses only. Students with the teacher's token count (``mlp`` projector) and with a quarter
of it (``ldpnetv2``). Every score is on held-out scenes; an interval is Student's t over seeds. Finished jobs
are kept in ``build/experiment/results.jsonl``, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path("build/experiment")
CACHE = ROOT / "cache"
RESULTS = ROOT / "results.jsonl"
STORED = Path(__file__).parent / "results" / "experiment.json"
SEEDS = (101, 102, 103, 104, 105)  # never used while anything was tuned
CURVE_SEEDS = SEEDS[:3]
STEPS = 300
CURVE_STEPS = (75, 150, 300, 600, 1200)
ITEMS = 100  # held-out items of each kind
# 97.5 % points of Student's t by degrees of freedom.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

ARMS: dict[str, dict[str, Any]] = {
    "SFT": {"losses": {"lm": 1.0}},
    "+ logit KD": {"losses": {"lm": 1.0, "logits": 1.0}},
    "+ visual_map, sink-filtered cosine": {
        "losses": {"lm": 1.0, "logits": 1.0, "visual_map": 1.0, "visual_map_kind": "sink_filtered"}
    },
    "+ visual_map, cosine": {
        "losses": {"lm": 1.0, "logits": 1.0, "visual_map": 1.0, "visual_map_kind": "cosine"}
    },
    "+ visual_columns": {"losses": {"lm": 1.0, "logits": 1.0, "visual_columns": 1.0}},
    "+ answer_attention": {"losses": {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0}},
    "+ answer_attention + TAF": {
        "losses": {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0}, "projector": "taf",
    },
    "control: answer_attention of another image": {
        "losses": {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0}, "shuffle_teacher_images": True,
    },
}  # fmt: skip
CURVE_ARMS = ("SFT", "+ logit KD", "+ answer_attention")
TOKENS = {"same": "mlp", "quarter": "ldpnetv2"}


@dataclass(frozen=True)
class Job:
    """One training: an arm, a token count, a budget, a seed."""

    arm: str
    tokens: str
    steps: int
    seed: int


def all_jobs() -> list[Job]:
    """Every job, seeds outermost, so that an interrupted run has whole comparisons."""
    jobs = []
    for seed in SEEDS:
        jobs += [Job(arm, tokens, STEPS, seed) for tokens in TOKENS for arm in ARMS]
        if seed in CURVE_SEEDS:
            jobs += [
                Job(arm, "quarter", steps, seed)
                for steps in CURVE_STEPS if steps != STEPS
                for arm in CURVE_ARMS
            ]  # fmt: skip
    return jobs


def build_cache() -> None:
    """Run stage one with every signal, or find it done."""
    from stage1_teacher.config import BuildConfig
    from stage1_teacher.extract import extract
    from stage1_teacher.report import summary_text

    signals = ("logits", "answer_attention", "visual_columns", "visual_map")
    sys.stdout.write(summary_text(extract(BuildConfig(cache=str(CACHE), signals=signals))) + "\n")


def run_job(job: Job) -> dict[str, Any]:
    """Train and score one student.

    Returns:
        The job's fields, its scores in percent, training seconds and the median step in ms.
    """
    import torch

    torch.set_num_threads(1)
    from data.registry import open_evaluation
    from stage2_student.evaluate import evaluate_model
    from stage2_student.run import set_up_libraries
    from stage2_student.train import train_student

    set_up_libraries()
    arm = dict(ARMS[job.arm])
    output = ROOT / "runs" / f"{list(ARMS).index(job.arm)}-{job.tokens}-{job.steps}-{job.seed}"
    shutil.rmtree(output, ignore_errors=True)
    phase = {"steps": job.steps, "batch_size": 16, "lr": 2e-3, "losses": arm.pop("losses")}
    projector = arm.pop("projector", TOKENS[job.tokens])
    started = time.monotonic()
    result = train_student(
        student="mobilevlm-tiny", projector=projector, data="shapes", cache=str(CACHE), output=str(output),
        phases=["dft"], dft=phase, seed=job.seed, checkpoint_every=10**6, max_length=512,
        pool_teacher_tokens=projector == "taf" and job.tokens == "quarter", **arm,
    )  # fmt: skip
    seconds = time.monotonic() - started
    report = evaluate_model(
        result.model, result.preparation.encoder, open_evaluation("shapes", "test", ITEMS), letters=False
    )
    shutil.rmtree(output)
    steps = [record["step_s"] for record in result.log if "step_s" in record]
    return {
        **asdict(job), "seconds": round(seconds, 1), "step_ms": round(1000 * statistics.median(steps), 2),
        "scores": {name: round(100 * score.value, 2) for name, score in report.scores.items()},
    }  # fmt: skip


def score_teacher() -> dict[str, float]:
    """The teacher's own scores on the same items."""
    from data.registry import open_evaluation
    from stage1_teacher.demo_teacher import builtin_teacher_directory
    from stage1_teacher.plan import build_encoder
    from stage1_teacher.teacher import Teacher
    from stage2_student.evaluate import evaluate_model

    teacher = Teacher(builtin_teacher_directory())
    encoder = build_encoder(teacher, template="short", max_length=512)
    report = evaluate_model(teacher.model, encoder, open_evaluation("shapes", "test", ITEMS), letters=False)
    return {name: round(100 * score.value, 2) for name, score in report.scores.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval over seeds (0 for a single seed: none can be given)."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), T_QUANTILE[len(values) - 1] * statistics.stdev(values) / math.sqrt(
        len(values)
    )


def select(results: list[dict[str, Any]], **wanted: Any) -> dict[int, dict[str, Any]]:
    """Results that match, by seed."""
    return {r["seed"]: r for r in results if all(r[name] == value for name, value in wanted.items())}


def tables(results: list[dict[str, Any]], teacher: dict[str, float]) -> str:
    """The tables as Markdown."""
    lines = []
    for tokens in TOKENS:
        base = select(results, arm="+ logit KD", tokens=tokens, steps=STEPS)
        sft = select(results, arm="SFT", tokens=tokens, steps=STEPS)
        lines += [
            f"Students with {'the same number of' if tokens == 'same' else 'a quarter of the'} visual tokens, "
            f"{STEPS} steps, {len(sft)} seeds (teacher: {teacher['likelihood']:.1f} / {teacher['questions']:.1f}):",
            "",
            "| losses | captions by likelihood, % | questions, % | gain over logit KD, points |",
            "|---|---|---|---|",
        ]
        for arm in ARMS:
            found = select(results, arm=arm, tokens=tokens, steps=STEPS)
            if not found:
                continue
            cells = ["{:.1f} ± {:.1f}".format(*interval([r["scores"][name] for r in found.values()]))
                     for name in ("likelihood", "questions")]  # fmt: skip
            paired = [r["scores"]["likelihood"] - base[seed]["scores"]["likelihood"]
                      for seed, r in found.items() if seed in base]  # fmt: skip
            gain = "-" if arm == "+ logit KD" or not paired else "{:+.1f} ± {:.1f}".format(*interval(paired))
            lines.append(f"| {arm} | {cells[0]} | {cells[1]} | {gain} |")
        lines.append("")
    lines += [f"Score against steps (quarter tokens, {len(CURVE_SEEDS)} seeds, captions by likelihood, %):", "",
              "| losses | " + " | ".join(map(str, CURVE_STEPS)) + " |", "|---" * (len(CURVE_STEPS) + 1) + "|"]  # fmt: skip
    for arm in CURVE_ARMS:
        row = []
        for steps in CURVE_STEPS:
            found = select(results, arm=arm, tokens="quarter", steps=steps)
            values = [found[seed]["scores"]["likelihood"] for seed in CURVE_SEEDS if seed in found]
            row.append("{:.1f} ± {:.1f}".format(*interval(values)) if values else "-")
        lines.append(f"| {arm} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2)))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    build_cache()
    teacher = score_teacher()
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    done = {(r["arm"], r["tokens"], r["steps"], r["seed"]) for r in results}
    jobs = [job for job in all_jobs() if (job.arm, job.tokens, job.steps, job.seed) not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        for count, future in enumerate(as_completed(futures), 1):
            result = future.result()
            results.append(result)
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
            sys.stdout.write(f"{count}/{len(jobs)} {futures[future]} {result['scores']['likelihood']}\n")
            sys.stdout.flush()
    ordered = sorted(results, key=lambda r: (r["seed"], r["tokens"], r["steps"], list(ARMS).index(r["arm"])))
    STORED.write_text(json.dumps({"teacher": teacher, "results": ordered}, indent=1) + "\n")
    sys.stdout.write(tables(ordered, teacher) + "\n")


if __name__ == "__main__":
    main()

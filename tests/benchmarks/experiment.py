"""The ablations on built-in data: which teacher signal helps a student, at equal data, steps and seeds.

    make experiment          # builds the caches, trains every arm for every seed, prints and stores the tables

Arms (``experiment_arms``) differ in what they learn from only. Students with the teacher's token count (``mlp``
projector) and with a quarter of it (``ldpnetv2``). Every score is on held-out scenes; an interval is Student's t over
seeds. Finished jobs are kept in ``build/experiment/results.jsonl``, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.experiment_arms import ARMS, PARTS, SEEDS, TOKENS, Job
from tests.benchmarks.experiment_tables import in_order, tables

ROOT = Path("build/experiment")
CACHES = {
    "cache": {"signals": ("logits", "answer_attention", "text_attention", "visual_columns", "visual_map")},
    "layers": {"signals": ("logits", "answer_attention", "visual_map"), "groups": 6, "layers": "all"},
}
RESULTS = ROOT / "results.jsonl"
STORED = Path(__file__).parent / "results" / "experiment.json"
DATA = "shapes"
RATIO_PAIRS, RATIO_STEPS = 5, 40
ITEMS = 100  # held-out items of each kind


def build_caches() -> None:
    """Run stage one with every signal, and once more with every single layer; or find both done."""
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.extract import extract
    from vlm_distill_cache.stage1_teacher.report import summary_text

    for name, options in CACHES.items():
        summary = extract(BuildConfig(data=DATA, cache=str(ROOT / name), **options))  # type: ignore[arg-type]
        sys.stdout.write(summary_text(summary) + "\n")


def run_job(job: Job) -> dict[str, Any]:
    """Train and score one student.

    Returns:
        The job's fields, its scores in percent, training seconds and the median step in ms.
    """
    import torch

    torch.set_num_threads(1)
    from vlm_distill_cache.data.registry import open_evaluation
    from vlm_distill_cache.stage2_student.run import set_up_libraries
    from vlm_distill_cache.stage2_student.scores.evaluate import evaluate_model

    set_up_libraries()
    started = time.monotonic()
    result, output = train_job(job)
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


def train_job(job: Job) -> tuple[Any, Path]:
    """Train one student, with its cache or with the teacher in the loop.

    Returns:
        What `train` returns, and the output folder.
    """
    from tests.benchmarks.train_student import train_student

    arm = dict(ARMS[job.arm])
    output = ROOT / "runs" / f"{list(ARMS).index(job.arm)}-{job.tokens}-{job.steps}-{job.seed}"
    shutil.rmtree(output, ignore_errors=True)
    phase = {"steps": job.steps, "batch_size": 16, "lr": 2e-3, "losses": arm.pop("losses")}
    projector = arm.pop("projector", TOKENS[job.tokens])
    cache = str(ROOT / arm.pop("cache", "cache"))
    options = {
        "student": "mobilevlm-tiny", "projector": projector, "data": DATA, "cache": cache, "output": str(output),
        "phases": ["dft"], "dft": phase, "seed": job.seed, "checkpoint_every": 10**6, "max_length": 512,
        "pool_teacher_tokens": projector == "taf" and job.tokens == "quarter",
    }  # fmt: skip
    if not arm.pop("online", False):
        return train_student(**options, **arm), output
    from tests.benchmarks.experiment_online import train_online
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.planning.open import open_build

    return train_online(open_build(BuildConfig(data=DATA, cache=cache)), **options, **arm), output


def time_online() -> dict[str, float]:
    """Step of the student with its teacher in the loop over the cached one, medians of runs side by side.

    Returns:
        ``cached_ms`` and ``online_ms`` a step, and the ``ratio`` of each pair's: its median, lowest and highest.
    """
    import torch

    torch.set_num_threads(1)
    pairs = []
    for seed in range(RATIO_PAIRS):
        times = []
        for arm in ("+ answer_attention", "online: + answer_attention"):
            result, output = train_job(Job(arm, "same", RATIO_STEPS, seed))
            shutil.rmtree(output)
            # The first steps warm up: threads, allocator, encoded samples.
            times.append(1000 * statistics.median(r["step_s"] for r in result.log[RATIO_STEPS // 4 :]))
        pairs.append(times)
    ratios = sorted(online / cached for cached, online in pairs)
    return {
        "cached_ms": round(statistics.median(cached for cached, _ in pairs), 1),
        "online_ms": round(statistics.median(online for _, online in pairs), 1),
        "ratio": round(statistics.median(ratios), 3), "lowest": round(ratios[0], 3), "highest": round(ratios[-1], 3),
    }  # fmt: skip


def score_teacher() -> dict[str, float]:
    """The teacher's own scores on the same items."""
    from vlm_distill_cache.data.registry import open_evaluation
    from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory
    from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
    from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher
    from vlm_distill_cache.stage2_student.scores.evaluate import evaluate_model

    teacher = Teacher(builtin_teacher_directory())
    encoder = build_encoder(teacher, template="short", max_length=512)
    report = evaluate_model(teacher.model, encoder, open_evaluation("shapes", "test", ITEMS), letters=False)
    return {name: round(100 * score.value, 2) for name, score in report.scores.items()}


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2)))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="Only the first so many seeds.")
    parser.add_argument("--part", choices=PARTS, action="append", help="Only these jobs (default: all).")
    parser.add_argument("--go-on", action="store_true", help="Add to the stored results.")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    build_caches()
    teacher = score_teacher()
    if arguments.go_on and not RESULTS.exists():
        stored = json.loads(STORED.read_text())["results"]
        RESULTS.write_text("".join(json.dumps(result) + "\n" for result in stored))
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    done = {(r["arm"], r["tokens"], r["steps"], r["seed"]) for r in results}
    wanted = [job for part in arguments.part or PARTS for job in PARTS[part]() if job.seed in SEEDS[: arguments.seeds]]
    jobs = [job for job in wanted if (job.arm, job.tokens, job.steps, job.seed) not in done]
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
    ordered = in_order(results)
    ratio = time_online()
    STORED.write_text(json.dumps({"teacher": teacher, "online": ratio, "results": ordered}, indent=1) + "\n")
    sys.stdout.write(tables(ordered, teacher) + "\n\n")
    sys.stdout.write(
        f"A step with the teacher in the loop takes {ratio['ratio']} times the cached one ({ratio['lowest']} to "
        f"{ratio['highest']} in {RATIO_PAIRS} pairs; {ratio['online_ms']} against {ratio['cached_ms']} ms).\n"
    )


if __name__ == "__main__":
    main()

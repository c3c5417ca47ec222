"""Sinks, fewer visual tokens, shifts while decoding, pruning: what each gains or costs on the built-in data.

    make experiment-seeds    # builds the caches, trains and scores every arm for every seed, writes docs/results.md

Arms (``experiment_seeds_arms``) that are compared have equal steps, data and seeds; every score is on held-out scenes,
an interval is Student's t over seeds. What is done is kept in ``build/experiment-seeds``: a job that was killed is
run again, the others are not.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.experiment_seeds_arms import ARMS, BASE, KEEP, SEEDS, cuts
from tests.benchmarks.experiment_seeds_tables import in_order, tables, write_page
from vlm_distill_cache.common.files.atomic import try_lock
from vlm_distill_cache.common.terminal.command_line import end_with_parent

STORED = Path(__file__).parent / "results" / "experiment_seeds.json"
SIGNALS = ("logits", "answer_attention", "visual_columns", "visual_map", "hidden", "tower_attention")
MEASURED = 50  # samples that importance is measured on: fewer than the smallest share of the data
BATCH = 64  # captions or questions that are decoded at once
FROM_SCRATCH = {"student": "mobilevlm-tiny", "projector": "mlp"}


@dataclass(frozen=True)
class Budget:
    """How much is done; results of different budgets are never mixed.

    Attributes:
        data: What students learn from and are scored on.
        items: Held-out items of each kind.
        steps: Of a student from scratch.
        pruned_steps: Of a pruned one: about one epoch of all data.
    """

    data: str = "shapes"
    items: int = 100
    steps: int = 300
    pruned_steps: int = 100


@dataclass(frozen=True)
class Job:
    """One row for one seed."""

    arm: str
    seed: int


@dataclass(frozen=True)
class Place:
    """Where an experiment keeps what it has made."""

    root: Path
    budget: Budget

    @property
    def cache(self) -> Path:
        """What students learn from."""
        return self.root / "cache"

    @property
    def held_out(self) -> Path:
        """Where the teacher looks on the scored pictures, for the oracle."""
        return self.root / "held-out"

    @property
    def results(self) -> Path:
        """A line for each job."""
        return self.root / "results.jsonl"

    def cut(self, name: str) -> Path:
        """The folder of a pruned student before it recovers."""
        return self.root / "cuts" / re.sub("[^0-9a-z.]+", "-", name)

    def run(self, job: Job) -> Path:
        """A job's own folder while it runs: others run beside it."""
        return self.root / "runs" / f"{list(ARMS).index(job.arm)}-{job.seed}"

    def trained(self, job: Job) -> Path:
        """The folder of a trained student that others are made of."""
        return self.root / "trained" / f"{list(ARMS).index(job.arm)}-{job.seed}"


def read_results(place: Any) -> list[dict[str, Any]]:
    """What is done; the half line of a killed run is left out."""
    lines = place.results.read_text().splitlines(keepends=True) if place.results.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    wanted = asdict(place.budget)
    return [{k: v for k, v in one.items() if k != "budget"} for one in found if one["budget"] == wanted]


def build_caches(place: Place) -> None:
    """Run stage one on the data, and on the scored pictures for the oracle; or find both done."""
    from vlm_distill_cache.data.registry import open_evaluation
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.extract import extract
    from vlm_distill_cache.stage1_teacher.report import summary_text

    items = open_evaluation(place.budget.data, "test", place.budget.items)
    scored = 1 + max(item.image.index for item in (*items.pairs, *items.questions))  # type: ignore[attr-defined]
    configs = (
        BuildConfig(data=place.budget.data, cache=str(place.cache), signals=SIGNALS),  # type: ignore[arg-type]
        BuildConfig(
            data=f"shapes:images={scored}", split="test", cache=str(place.held_out), signals=("answer_attention",)
        ),
    )
    for config in configs:
        sys.stdout.write(summary_text(extract(config)) + "\n")


def cut(place: Place, name: str) -> Path:
    """Cut one of `cuts` out of the built-in teacher, once; its folder. Not for several processes at once."""
    from tests.benchmarks.train_student import cut_out
    from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory

    student, how = cuts()[name]
    options = {
        "student": student, "teacher": str(builtin_teacher_directory()), "cache": str(place.cache),
        "output": str(place.cut(name)), "phases": ["dft"], "pruning": {"samples": MEASURED, **how},
    }  # fmt: skip
    return cut_out(options)


def train_job(place: Place, job: Job) -> tuple[Any, Any, dict[str, Any]]:
    """Train a student, and keep its folder if other arms are made of it.

    Returns:
        The student, its encoder, and what is told of its training.
    """
    from tests.benchmarks.train_student import train_student

    arm, budget = ARMS[job.arm], place.budget
    output = place.run(job)
    shutil.rmtree(output, ignore_errors=True)
    pruned = arm.part == "pruning"
    steps, rate = (budget.pruned_steps, 5e-4) if pruned else (budget.steps, 2e-3)
    options = {**(FROM_SCRATCH if not pruned else {}), **arm.options}
    if pruned:
        options["student"] = str(cut(place, arm.options["student"]))
    result = train_student(
        **options, data=budget.data, cache=str(place.cache), output=str(output), seed=job.seed, phases=["dft"],
        dft={"steps": steps, "batch_size": 16, "lr": rate, "losses": arm.losses}, checkpoint_every=10**6, max_length=512,
    )  # fmt: skip
    if job.arm in KEEP:
        kept = place.trained(job)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        result.final.rename(kept)
    shutil.rmtree(output)
    samples = len(result.preparation.phases[0].dataset)
    return result.model, result.preparation.encoder, {"steps": steps, "samples": samples}


def score(place: Place, model: Any, encoder: Any) -> dict[str, float]:
    """Captions and questions that are right, percent."""
    from vlm_distill_cache.data.registry import open_evaluation
    from vlm_distill_cache.stage2_student.scores.evaluate import evaluate_model

    items = open_evaluation(place.budget.data, "test", place.budget.items)
    report = evaluate_model(model, encoder, items, letters=False, resamples=1)
    return {name: round(100 * report.scores[name].value, 2) for name in ("likelihood", "questions")}


def score_cuts(place: Place) -> dict[str, dict[str, float]]:
    """Cut the pruned students, and score them before they recover."""
    from vlm_distill_cache.stage2_student.trained_student import open_model

    found = {}
    for name in cuts():
        student = open_model(cut(place, name), str(place.cache))
        found[name] = score(place, student.model, student.encoder)
    return found


def training_free(place: Place, job: Job, base: Job) -> dict[str, float]:
    """Scores of a trained student that feeds fewer visual tokens than it was trained with, or those that an oracle names."""
    from vlm_distill_cache.common.config import config_from_dict
    from vlm_distill_cache.common.opening import open_cache
    from vlm_distill_cache.stage2_student.config import TrainConfig
    from vlm_distill_cache.stage2_student.prune.tokens import select_tokens
    from vlm_distill_cache.stage2_student.scores.oracle import followed, read_oracle
    from vlm_distill_cache.stage2_student.trained_student import open_student

    options, folder, target = dict(ARMS[job.arm].options), place.trained(base), place.run(job)
    oracle = read_oracle(open_cache(str(place.held_out))) if options.pop("oracle", False) else None
    if base.arm == BASE:
        shutil.rmtree(target, ignore_errors=True)
        options |= {"cache": str(place.cache), "output": str(target), "seed": base.seed}
        select_tokens(folder, target, config_from_dict(TrainConfig, options, where=str(folder)), cache=str(place.cache))
        folder = target
    student = open_student(folder, device="cpu")
    with followed(oracle):
        scores = score(place, student.model, student.encoder)
    shutil.rmtree(target, ignore_errors=True)
    return scores


def decoding(place: Place, job: Job, base: Job) -> dict[str, float]:
    """How a student decodes that looks at few visual tokens a step: given captions token by token, and own answers.

    Returns:
        Captions and questions that are right, percent; of the right captions ``nats`` a token, ``agreement`` with the
        student's own decoding with all tokens, percent of the tokens, and ``events``, swaps of visual tokens a caption.
    """
    import numpy as np

    from vlm_distill_cache.common.models.changed import change_model
    from vlm_distill_cache.data.families.table import family_of
    from vlm_distill_cache.data.registry import open_evaluation
    from vlm_distill_cache.data.sample import Sample, Turn
    from vlm_distill_cache.stage2_student.scores.evaluate import score_questions
    from vlm_distill_cache.stage2_student.scores.forced import forced_decoding, prompt_and_answer
    from vlm_distill_cache.stage2_student.scores.metrics import preference
    from vlm_distill_cache.stage2_student.students.library import core_of
    from vlm_distill_cache.stage2_student.students.model import generation_inputs_of
    from vlm_distill_cache.stage2_student.trained_student import open_student

    student = open_student(place.trained(base), device="cpu")
    model, encoder = student.model, student.encoder
    items = open_evaluation(place.budget.data, "test", place.budget.items)

    def dictate(caption: str) -> list[Any]:
        """Decode the right or the wrong captions, in batches."""
        asked = []
        for pair in items.pairs:
            said = Turn(question="", answer=getattr(pair, caption))
            asked.append(
                prompt_and_answer(encoder, Sample(sample_id=pair.item_id, images=(pair.image,), turns=(said,)))
            )
        batches = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
        make = generation_inputs_of(model)
        return [forced_decoding(model, encoder, *zip(*batch, strict=True), inputs=make) for batch in batches]

    whole = dictate("right")
    core = core_of(model)
    how = {**ARMS[job.arm].options, "shift_threshold": 0.75, "layers": None}
    change_model(core, family_of(core.config.model_type).parts, decoding_tokens=how)
    right, wrong = dictate("right"), dictate("wrong")
    sums = [np.concatenate([part.log_probs.sum(dim=1).numpy() for part in side]) for side in (right, wrong)]
    tokens, captions = sum(int(part.real.sum()) for part in right), len(items.pairs)
    same = sum(int(((part.best == other.best) & part.real).sum()) for part, other in zip(right, whole, strict=True))
    events = sum(int(part.events.sum()) for part in right)
    answers = score_questions(model, encoder, items.questions, batch_size=BATCH)
    return {
        "likelihood": round(100 * float(preference(*sums).mean()), 2), "questions": round(100 * float(answers.mean()), 2),
        "nats": round(-float(sums[0].sum()) / tokens, 5), "agreement": round(100 * same / tokens, 3),
        "events": round(events / captions, 3),
    }  # fmt: skip


def quantised(place: Place, job: Job, base: Job) -> dict[str, float]:
    """Scores with fewer bits, and the weights' size."""
    from vlm_distill_cache.stage2_student.trained_student import export_student, open_student

    target = place.run(job)
    shutil.rmtree(target, ignore_errors=True)
    export_student(place.trained(base), target, **ARMS[job.arm].options)
    student = open_student(target, device="cpu")
    scores = score(place, student.model, student.encoder) | {"megabytes": megabytes(target)}
    shutil.rmtree(target)
    return scores


def megabytes(folder: Path) -> float:
    """Size of a student's weights, 10^6 bytes."""
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6, 3)


WAYS: dict[str, Callable[[Place, Job, Job], dict[str, float]]] = {
    "training-free": training_free, "decoding": decoding, "quantised": quantised,
}  # fmt: skip


def run_job(place: Place, job: Job) -> dict[str, Any]:
    """Train or change one student, and score it.

    Returns:
        The job's fields, its scores, and what is told of its training.
    """
    import torch

    torch.set_num_threads(1)
    from vlm_distill_cache.stage2_student.run import set_up_libraries

    set_up_libraries()
    started, arm, told = time.monotonic(), ARMS[job.arm], {}
    if arm.of:
        scores = WAYS[arm.part](place, job, replace(job, arm=arm.of))
    else:
        model, encoder, told = train_job(place, job)
        scores = score(place, model, encoder)
        if job.arm in KEEP:
            scores["megabytes"] = megabytes(place.trained(job))
    return {**asdict(job), **told, "seconds": round(time.monotonic() - started, 1), "scores": scores}


def missing(place: Place, results: list[dict[str, Any]], jobs: list[Job]) -> list[list[Job]]:
    """What is still to be run, in two waves: students that others are made of come first.

    A student that was scored is trained again if others are to be made of it and its folder is gone.
    """
    done = {Job(found["arm"], found["seed"]) for found in results}
    second = [job for job in jobs if job not in done and ARMS[job.arm].of]
    needed = {replace(job, arm=ARMS[job.arm].of) for job in second}
    absent = {job for job in needed if not place.trained(job).is_dir()}
    first = [job for job in jobs if not ARMS[job.arm].of and (job not in done or job in absent)]
    return [first + sorted(absent - set(first), key=lambda job: job.seed), second]


def run(place: Any, waves: list[list[Job]], do: Callable[[Any, Job], dict[str, Any]], workers: int) -> list[str]:
    """Run jobs, a wave behind the other, append them to the results, and say what failed: the other jobs go on.

    Args:
        place: A `Place`, or another experiment's, with ``results`` and ``budget``.
        do: Runs one job, in a process of its own.
    """
    context, failed = multiprocessing.get_context("spawn"), []
    place.results.touch()
    whole = [line for line in place.results.read_text().splitlines(keepends=True) if line.endswith("\n")]
    place.results.write_text("".join(whole))  # what was killed while it wrote leaves half a line
    for wave in waves:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
            futures = {pool.submit(do, place, job): job for job in wave}
            for count, future in enumerate(as_completed(futures), 1):
                job, error = futures[future], future.exception()
                if error is not None:
                    failed.append(f"{job.arm}, seed {job.seed}: {error}")
                    sys.stdout.write(f"{count}/{len(wave)} {failed[-1]}\n")
                    continue
                result = future.result()
                with place.results.open("a") as file:
                    file.write(json.dumps(result | {"budget": asdict(place.budget)}) + "\n")
                sys.stdout.write(f"{count}/{len(wave)} {job.arm}, seed {job.seed}: {result['scores']}\n")
                sys.stdout.flush()
    return failed


def score_teacher(place: Place) -> dict[str, float]:
    """The teacher's own scores on the same items."""
    from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory
    from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
    from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

    teacher = Teacher(builtin_teacher_directory())
    return score(place, teacher.model, build_encoder(teacher, template="short", max_length=512))


def write_stored(stored: dict[str, Any], path: Path) -> None:
    """Write results as JSON, a job a line."""
    lines = ",\n".join(json.dumps(result) for result in stored["results"])
    rest = {name: value for name, value in stored.items() if name != "results"}
    path.write_text(json.dumps(rest)[:-1] + ',\n"results": [\n' + lines + "\n]}\n")


def main() -> None:
    """Run what is missing, store the results, write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2)))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="Only the first so many seeds.")
    parts = list(dict.fromkeys(arm.part for arm in ARMS.values()))
    parser.add_argument("--part", choices=parts, action="append", help="Only these jobs (default: all).")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    place = Place(Path("build/experiment-seeds"), Budget())
    place.root.mkdir(parents=True, exist_ok=True)
    lock = try_lock(place.root)
    if lock is None:
        sys.exit(f"{place.root}: another experiment is running there; wait for it, or stop it")
    build_caches(place)
    cuts = score_cuts(place)
    names = [name for name, arm in ARMS.items() if arm.part in (arguments.part or parts)]
    # Seeds outermost, so that an interrupted run has whole comparisons.
    jobs = [Job(name, seed) for seed in SEEDS[: arguments.seeds] for name in names]
    failed = run(place, missing(place, read_results(place), jobs), run_job, arguments.workers)
    stored = {
        "budget": asdict(place.budget), "teacher": score_teacher(place), "cuts": cuts,
        "results": in_order(read_results(place)),
    }  # fmt: skip
    write_stored(stored, STORED)
    write_page(Path("docs/results.md"), stored)
    sys.stdout.write(tables(stored) + "\n")
    if failed:
        sys.exit("\n".join([f"{len(failed)} jobs failed; the same command runs them again:", *failed]))


if __name__ == "__main__":
    main()

"""Does the teacher's gaze help where several pictures count: comparison and motion on drawn data.

    make experiment-several    # teacher, cache, students of every arm and seed; writes docs/results.md

1. Teacher: the built-in one, taught to compare pictures and to follow clips (``experiment_several_teacher``).
2. Cache: logits, answer attention and visual columns of drawn pictures, pairs and clips.
3. Students from scratch and students cut out of the teacher, by the arms of ``experiment_several_tables``, at equal steps,
   data and seeds. Scores are exact matches on held-out pairs and clips, and on those about combinations that no training
   sample shows; an interval is Student's t over seeds.

What is done is kept in ``build/experiment-several``: a job that was killed is run again, the others are not.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.experiment_seeds import Job, read_results, run, write_stored
from tests.benchmarks.experiment_several_tables import ARMS, CUT, SEEDS, in_order, most_frequent, tables, write_page
from tests.benchmarks.experiment_several_teacher import make_teacher, score
from vlm_distill_cache.common.files.atomic import try_lock

STORED = Path(__file__).parent / "results" / "experiment_several.json"
SIGNALS = ("logits", "answer_attention", "visual_columns")
ITEMS = "shapes:kinds=comparison+motion"
MEASURED = 50  # samples that the importance of layers is measured on
LENGTH = 2048  # tokens of all conversations behind a clip; each alone fits the built-in models


@dataclass(frozen=True)
class Budget:
    """How much is done; results of different budgets are never mixed.

    Attributes:
        data: What students learn from.
        items: Held-out items of each kind.
        teacher_steps: Of the teacher's courses, 8 samples each.
        steps: Of a student from scratch, 16 samples each.
        cut_steps: Of a student that is cut out of the teacher.
    """

    data: str = "shapes:images=1800,kinds=scene+comparison+motion"
    items: int = 100
    teacher_steps: str = "3000+2400"
    steps: int = 600
    cut_steps: int = 200


@dataclass(frozen=True)
class Place:
    """Where the experiment keeps what it has made."""

    root: Path
    budget: Budget

    @property
    def teacher(self) -> Path:
        """The teacher's folder; other steps, another teacher."""
        return self.root / f"teacher-{self.budget.teacher_steps}"

    @property
    def cache(self) -> Path:
        """What students learn from."""
        return self.root / f"cache-{self.budget.teacher_steps}"

    @property
    def cut(self) -> Path:
        """The student that is cut out of the teacher, before it is trained."""
        return self.root / f"cut-{self.budget.teacher_steps}"

    @property
    def results(self) -> Path:
        """A line for each job."""
        return self.root / "results.jsonl"


def build_cache(place: Place) -> None:
    """Run stage one on what students learn from, or find it done."""
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.extract import extract
    from vlm_distill_cache.stage1_teacher.report import summary_text

    config = BuildConfig(
        data=place.budget.data, teacher=str(place.teacher), cache=str(place.cache), signals=SIGNALS, max_length=LENGTH
    )
    sys.stdout.write(summary_text(extract(config)) + "\n")


def cut_student(place: Place) -> Path:
    """Cut the student out of the teacher, or find it done; its folder. Not for several processes at once."""
    from tests.benchmarks.train_student import cut_out

    options = {
        "student": "pruned:depth:0.5", "teacher": str(place.teacher), "cache": str(place.cache), "max_length": LENGTH,
        "output": str(place.cut), "phases": ["dft"], "pruning": {"samples": MEASURED},
    }  # fmt: skip
    return cut_out(options)


def items_of(place: Place) -> tuple[Any, ...]:
    """The held-out questions, of every kind as many."""
    from vlm_distill_cache.data.registry import open_evaluation

    return open_evaluation(ITEMS, "test", place.budget.items).questions


def run_job(place: Place, job: Job) -> dict[str, Any]:
    """Train one student, and score it.

    Returns:
        The job's fields, its scores in percent by kind of question, and seconds.
    """
    import torch

    torch.set_num_threads(1)
    from tests.benchmarks.train_student import train_student
    from vlm_distill_cache.stage2_student.run import set_up_libraries

    set_up_libraries()
    started, budget = time.monotonic(), place.budget
    output = place.root / "runs" / f"{list(ARMS).index(job.arm)}-{job.seed}"
    shutil.rmtree(output, ignore_errors=True)
    student: dict[str, Any] = {"student": "mobilevlm-tiny", "projector": "mlp"}
    steps, rate = budget.steps, 2e-3
    if job.arm.endswith(CUT):
        student, steps, rate = {"student": str(cut_student(place))}, budget.cut_steps, 5e-4
    result = train_student(
        **student, data=budget.data, cache=str(place.cache), output=str(output),
        seed=job.seed, phases=["dft"], max_length=LENGTH, checkpoint_every=10**6,
        dft={"steps": steps, "batch_size": 16, "lr": rate, "losses": ARMS[job.arm]},
    )  # fmt: skip
    shutil.rmtree(output)
    scores = score(result.model, result.preparation.encoder, items_of(place))
    return {**asdict(job), "seconds": round(time.monotonic() - started, 1), "scores": scores}


def score_teacher(place: Place) -> dict[str, float]:
    """The teacher's own scores on the same items."""
    from dataclasses import replace

    from vlm_distill_cache.data.sample import FrameSampling
    from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
    from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

    teacher = Teacher(place.teacher)
    encoder = build_encoder(teacher, template="short", max_length=LENGTH)
    return score(teacher.model, replace(encoder, most_pictures=None, sampling=FrameSampling()), items_of(place))


def main() -> None:
    """Run what is missing, store the results, write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2)))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="Only the first so many seeds.")
    parser.add_argument("--tiny", action="store_true", help="Try the whole way in minutes; stores no results.")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vlm_distill_cache.stage1_teacher.demo").setLevel(logging.INFO)  # how far the teacher is
    tiny = Budget(
        data="shapes:images=24,kinds=scene+comparison+motion", items=2, teacher_steps="2+2", steps=2, cut_steps=2
    )
    place = Place(Path("build/experiment-several"), tiny if arguments.tiny else Budget())
    place.root.mkdir(parents=True, exist_ok=True)
    lock = try_lock(place.root)
    if lock is None:
        sys.exit(f"{place.root}: another experiment is running there; wait for it, or stop it")
    make_teacher(place.teacher, steps=[int(steps) for steps in place.budget.teacher_steps.split("+")])
    build_cache(place)
    cut_student(place)
    done = {(found["arm"], found["seed"]) for found in read_results(place)}
    # Seeds outermost, so that an interrupted run has whole comparisons.
    jobs = [Job(arm, seed) for seed in SEEDS[: arguments.seeds] for arm in ARMS if (arm, seed) not in done]
    failed = run(place, [jobs], run_job, arguments.workers)
    stored = {
        "budget": asdict(place.budget), "teacher": score_teacher(place),
        "most_frequent": most_frequent(items_of(place)), "results": in_order(read_results(place)),
    }  # fmt: skip
    if not arguments.tiny:
        write_stored(stored, STORED)
        write_page(Path("docs/results.md"), stored)
    sys.stdout.write(tables(json.loads(json.dumps(stored))) + "\n")
    if failed:
        sys.exit("\n".join([f"{len(failed)} jobs failed; the same command runs them again:", *failed]))


if __name__ == "__main__":
    main()

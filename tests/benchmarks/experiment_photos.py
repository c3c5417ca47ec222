"""Does the teacher's gaze help with real features, a real language model and photographs?

    make experiment-photos              # teacher, caches, students of every arm and seed; writes docs/results.md
    make experiment-photos DATA=folder  # the same on natural photographs with captions (`experiment_photos_folder`)

1. Teacher: EfficientNet-Lite0 and SmolLM2-135M, taught drawn photographs (``experiment_photos_teacher``). Students are trained
   from it once it has 85 % of order and relations right on pictures that nothing else is scored on.
2. Caches: one of all signals, and one for each budget of logits and gaze.
3. Students: the teacher's first layers, or cut out of it in width, with its tower and projector; by the arms of
   ``experiment_photos_arms``, at equal steps, data and order. Scores are on pairs of things that were never seen together; an
   interval is Student's t over seeds. The blind row sees the mean picture.

4. A page: where the teacher and three students look on held-out pictures; and the sinks that the cache shows.

What is done is kept in ``build/experiment-photos``: a job that was killed is run again, the others are not. Of each run
its configuration and log stay in ``runs``, its answers item by item in the results. A folder's results, tables included, stay
in ``folders`` there, by the fingerprint of its pictures and captions. ``--tiny`` tries all of it in minutes, apart from the rest.
"""

import argparse
import json
import logging
import os
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.experiment_photos_arms import (
    ANSWER,
    ARMS,
    CACHE,
    COMPARED,
    HELD_OUT,
    LAYERS,
    PARTS,
    SEEDS,
    SFT,
    WIDTH,
    WIDTH_STUDENT,
    cache_options,
)
from tests.benchmarks.experiment_photos_folder import FOLDER, FolderData, balanced, read_photographs
from tests.benchmarks.experiment_photos_gaze import count_sinks, write_gaze
from tests.benchmarks.experiment_photos_scores import DRAWN, Scoring
from tests.benchmarks.experiment_photos_tables import expected_hours, in_order, tables, write_page
from tests.benchmarks.experiment_seeds import Job, read_results, run, write_stored
from vlm_distill_cache.common.files.atomic import try_lock
from vlm_distill_cache.data.photos.dataset import NAME

STORED = Path(__file__).parent / "results" / "experiment_photos.json"
TEACHER_SEED = 9  # of the teacher's own pictures
MEASURED = 64  # samples that a pruned student's parts are ranked on
BATCH, RATE = 16, 5e-4  # pictures a step of a student
TINY = (SFT, ANSWER)  # arms of ``--tiny``
SHOWN = 20  # held-out pictures on the page of where models look


@dataclass(frozen=True)
class Budget:
    """How much is done; results of different budgets are never mixed.

    Attributes:
        images: Pictures that students learn from, of a folder captions: `STEPS` steps see each once.
        items: Held-out items of each kind, twins in twos: an even number.
        teacher_steps: Of the teacher, 16 pictures each.
        stage: Which of the tower's features are seen, ``last`` or ``middle``.
        steps: Of a student, where they are not the arm's own.
        dtype: Of the products in training, ``float32`` or ``bfloat16``: which is faster depends on the processor.
    """

    images: int = 4000
    items: int = 100
    teacher_steps: int = 400
    stage: str = "last"
    steps: int | None = None
    dtype: str = "float32"


TINY_BUDGET: dict[str, Any] = {"images": 32, "items": 4, "teacher_steps": 4, "steps": 10}


@dataclass(frozen=True)
class Place:
    """Where the experiment keeps what it has made.

    Attributes:
        of_folder: Whether its data are those of a user's folder, prepared in ``data``; else photographs are drawn.
    """

    root: Path
    budget: Budget
    of_folder: bool = False

    @property
    def scoring(self) -> Scoring:
        """What is asked, and what decides."""
        return FOLDER if self.of_folder else DRAWN

    @property
    def folder(self) -> FolderData:
        """What of a user's folder is used."""
        from tests.benchmarks.experiment_photos_teacher import BATCH as PICTURES

        budget = self.budget
        return FolderData(self.root / "data", budget.images, budget.teacher_steps * PICTURES, budget.items, SHOWN)

    @property
    def taught(self) -> str:
        """What the teacher learns from."""
        from tests.benchmarks.experiment_photos_teacher import BATCH as PICTURES

        drawn = f"photo-scenes:images={self.budget.teacher_steps * PICTURES},seed={TEACHER_SEED}"
        return self.folder.teacher if self.of_folder else drawn

    @property
    def data(self) -> str:
        """What students learn from, and of drawn ones what they are scored on."""
        return self.folder.students if self.of_folder else f"photo-scenes:images={self.budget.images}"

    @property
    def held_out(self) -> str:
        """What the page shows, of the split ``test``."""
        return self.folder.held_out if self.of_folder else f"photo-scenes:images={SHOWN}"

    @property
    def teacher(self) -> Path:
        """The teacher's folder; of other steps, features or numbers, another teacher."""
        return self.root / f"teacher-{self.budget.stage}-{self.budget.teacher_steps}-{self.budget.dtype}"

    @property
    def made_of(self) -> Path:
        """What is made of the teacher as it is after so many steps."""
        return self.root / f"of-{self.teacher.name}-{self.budget.images}"

    @property
    def features(self) -> Path:
        """What the tower says of each picture."""
        return self.root / "features"

    @property
    def results(self) -> Path:
        """A line for each job."""
        return self.root / "results.jsonl"

    def cache(self, name: str) -> Path:
        """The cache of some arms."""
        return self.made_of / "caches" / re.sub("[^0-9a-z.]+", "-", name)

    def student(self, kind: str) -> Path:
        """The folder that students start from."""
        return self.made_of / f"student-{kind}"

    @property
    def asked(self) -> Path:
        """Of a folder, what is asked: balanced by what the blind teacher says."""
        return self.made_of / f"asked-{self.budget.items}.json"

    def run(self, job: Job) -> Path:
        """Configuration and log of a job."""
        return self.made_of / "runs" / f"{list(ARMS).index(job.arm)}-{job.seed}"

    def trained(self, arm: str) -> Path:
        """The folder of a student of the first seed that the page shows."""
        return self.made_of / "trained" / str(list(ARMS).index(arm))


def set_up(place: Place) -> None:
    """What every process of this experiment does first: know the tower, and where its features are kept."""
    import torch

    from tests.benchmarks.photo_tower import keep_features
    from vlm_distill_cache.stage2_student.run import set_up_libraries

    torch.set_num_threads(1)
    set_up_libraries()
    keep_features(place.features)


def items_of(place: Place, split: str = "test") -> Any:
    """The held-out items; of a folder's ``test`` those that `choose_items` chose."""
    from vlm_distill_cache.data.registry import open_evaluation

    if place.of_folder:
        return place.folder.pairs(split, json.loads(place.asked.read_text()) if split == "test" else None)
    return open_evaluation(place.data, split, place.budget.items)


def train_teacher(place: Place) -> dict[str, Any]:
    """Train the teacher on all cores, or find it trained; how its training went."""
    import torch

    from tests.benchmarks.experiment_photos_scores import answer_items, scores_of
    from tests.benchmarks.experiment_photos_teacher import make_teacher
    from vlm_distill_cache.data.registry import open_dataset

    budget, threads = place.budget, torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        return make_teacher(
            place.teacher, root=place.root, steps=budget.teacher_steps, stage=budget.stage, dtype=budget.dtype,
            dataset=open_dataset(place.taught), items=items_of(place, "validation"),
            score=lambda model, encoder, items: scores_of(answer_items(model, encoder, items), place.scoring),
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def choose_items(place: Place) -> None:
    """Balance what is asked of a folder by the answers of the teacher that sees the mean picture, once."""
    if not place.of_folder or place.asked.is_file():
        return
    from tests.benchmarks.experiment_photos_scores import answer_items, blinded
    from vlm_distill_cache.common.files.atomic import write_bytes_atomic

    items = place.folder.pairs("test")
    blind = answer_items(*open_teacher(place), blinded(items, mean_of(place)))
    chosen = balanced(items.pairs, blind, place.budget.items)
    place.made_of.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(place.asked, json.dumps(chosen).encode())
    kinds = Counter(items.pairs[number].kind for number in chosen)
    sys.stdout.write(f"asked, balanced by the blind teacher: {dict(kinds)}\n")


def open_teacher(place: Place) -> tuple[Any, Any]:
    """The trained teacher and its encoder."""
    from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
    from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

    teacher = Teacher(place.teacher)
    return teacher.model, build_encoder(teacher, template="short", max_length=512)


def mean_of(place: Place, name: str = "mean") -> Any:
    """The mean picture of what students learn from, in a file of that name: processes that run side by side have one each."""
    from tests.benchmarks.experiment_photos_scores import mean_picture
    from vlm_distill_cache.data.registry import open_dataset

    return mean_picture(open_dataset(place.data), place.root / f"{name}.png")


def build_cache(place: Place, name: str) -> float:
    """Run stage one, or find it done; bytes of logits and answer attention a supervised row."""
    from vlm_distill_cache.common.cache.manifest import read_manifest
    from vlm_distill_cache.common.cache.plan import read_plan
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.extract import extract
    from vlm_distill_cache.stage1_teacher.report import summary_text

    cache = place.cache(name)
    options: dict[str, Any] = {
        "data": place.data,
        "teacher": str(place.teacher),
        "max_length": 512,
        "batch_size": BATCH,
        "num_workers": 0,
    }
    if name == HELD_OUT:
        options |= {"data": place.held_out} if place.of_folder else {"data": place.held_out, "split": "test"}
    summary = extract(BuildConfig(**options, cache=str(cache), **cache_options(name)))
    sys.stdout.write(summary_text(summary) + "\n")
    plan, manifest = read_plan(cache), read_manifest(cache)
    of_signals = [field.name for signal in ("logits", "answer_attention") for field in plan.fields[signal]]
    size: int = sum(manifest.field_bytes[name] for name in of_signals)
    return round(size / manifest.totals["rows"], 2)


def make_students(place: Place, kinds: set[str]) -> None:
    """Cut what students start from out of the teacher, once."""
    from tests.benchmarks.experiment_photos_teacher import make_student
    from vlm_distill_cache.common.config import config_from_dict
    from vlm_distill_cache.stage2_student.config import TrainConfig
    from vlm_distill_cache.stage2_student.run import with_pruned_student
    from vlm_distill_cache.stage2_student.training.resolve import open_caches

    for kind in sorted(kinds):
        if place.student(kind).exists():
            continue
        if kind != WIDTH_STUDENT:
            make_student(place.teacher, place.student(kind), layers=LAYERS)
            continue
        output = place.made_of / "cut"
        options = {
            "student": f"pruned:width:{WIDTH}", "teacher": str(place.teacher), "data": place.data,
            "cache": str(place.cache("cache")), "output": str(output), "phases": ["dft"], "pruning": {"samples": MEASURED},
        }  # fmt: skip
        config = config_from_dict(TrainConfig, options, where="experiment_photos")
        cut = with_pruned_student(config, open_caches(config), say=lambda line: None)
        Path(cut.student).rename(place.student(kind))
        shutil.rmtree(output)


def train_job(place: Place, job: Job) -> Any:
    """Train one student from its cache, or with the teacher in the loop."""
    arm, output = ARMS[job.arm], place.run(job)
    shutil.rmtree(output, ignore_errors=True)
    steps = place.budget.steps or arm.steps
    phase = {"steps": steps, "batch_size": BATCH, "lr": RATE, "losses": arm.losses, **arm.phase}
    options = {
        "student": str(place.student(arm.student)), "data": place.data, "cache": str(place.cache(arm.cache)),
        "output": str(output), "phases": ["dft"], "dft": phase, "seed": job.seed, "dtype": place.budget.dtype, "max_length": 512,
        "checkpoint_every": 10**6, **arm.options,
    }  # fmt: skip
    if arm.online:
        from tests.benchmarks.experiment_online import train_online
        from vlm_distill_cache.stage1_teacher.config import BuildConfig
        from vlm_distill_cache.stage1_teacher.planning.open import open_build

        build = BuildConfig(
            data=place.data, teacher=str(place.teacher), cache=options["cache"], max_length=512, batch_size=BATCH,
            **cache_options(arm.cache),
        )  # fmt: skip
        return train_online(open_build(build), **options)
    from tests.benchmarks.train_student import train_student

    return train_student(**options)


def run_job(place: Place, job: Job) -> dict[str, Any]:
    """Train one student, and score it; its configuration and log stay, and a student that the page shows.

    Returns:
        The job's fields, steps, seconds, ``scores`` in percent, ``answers`` by item; of `SFT` also ``blind``, its scores
        where it sees the mean picture.
    """
    set_up(place)
    from tests.benchmarks.experiment_photos_scores import answer_items, blinded, scores_of

    started = time.monotonic()
    result = train_job(place, job)
    model, encoder, items = result.model, result.preparation.encoder, items_of(place)
    answers = answer_items(model, encoder, items)
    blind = {}
    if job.arm == SFT:
        unseen = answer_items(model, encoder, blinded(items, mean_of(place, f"mean-{job.seed}")))
        blind = {"blind": scores_of(unseen, place.scoring)}
    if job.arm in COMPARED and job.seed == SEEDS[0]:
        kept = place.trained(job.arm)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        result.final.rename(kept)
    for made in place.run(job).iterdir():  # weights and checkpoints
        if made.is_dir():
            shutil.rmtree(made)
    return {
        **asdict(job), "steps": len(result.log), "seconds": round(time.monotonic() - started, 1),
        "scores": scores_of(answers, place.scoring), **blind, "answers": answers,
    }  # fmt: skip


def score_teacher(place: Place) -> dict[str, dict[str, float]]:
    """The teacher's own scores on the same items, seeing and blind; kept beside what is made of it."""
    file = place.made_of / f"teacher-{place.budget.items}.json"
    if not file.is_file():
        from tests.benchmarks.experiment_photos_scores import answer_items, blinded, scores_of

        model, encoder = open_teacher(place)
        items = items_of(place)
        scores = {
            name: scores_of(answer_items(model, encoder, shown), place.scoring)
            for name, shown in (("teacher", items), ("blind", blinded(items, mean_of(place))))
        }
        file.write_text(json.dumps(scores))
    found: dict[str, dict[str, float]] = json.loads(file.read_text())
    return found


def show_gaze(place: Place) -> dict[str, float]:
    """Write the page of where teacher and students look; how alike each student's gaze is to the teacher's."""
    students = {arm: place.trained(arm) for arm in COMPARED if place.trained(arm).is_dir()}
    if not students:
        return {}
    build_cache(place, HELD_OUT)
    page = place.root / "gaze.html"
    alike = write_gaze(page, cache=place.cache(HELD_OUT), data=place.held_out, students=students, shown=SHOWN)
    sys.stdout.write(f"{page}: where the teacher looks, and {', '.join(students)}\n")
    return alike


def publish(place: Place, stored: dict[str, Any], *, apart: bool) -> None:
    """Store the results, write and print their tables: of the drawn pictures with the code, others beside what was made."""
    if apart:
        write_stored(stored, place.root / "results.json")
        (place.root / "results.md").write_text(tables(stored, place.scoring) + "\n")
    else:
        write_stored(stored, STORED)
        write_page(Path("docs/results.md"), stored)
    sys.stdout.write(tables(stored, place.scoring) + "\n")


def faster_dtype() -> str:
    """``bfloat16`` where the processor has instructions for it; one that has none emulates them in many times the time."""
    import torch

    return "bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"


def jobs_of(parts: list[str], seeds: int) -> list[Job]:
    """Jobs, seeds outermost, so that an interrupted run has whole comparisons."""
    return [
        Job(name, seed)
        for seed in SEEDS[:seeds]
        for name, arm in ARMS.items()
        if arm.part in parts and seed in arm.seeds
    ]


def main() -> None:
    """Run what is missing, store the results, write and print the tables, and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=NAME, help="A folder of pictures with captions, as COCO or Flickr8k have them."
    )
    parser.add_argument(
        "--tiny", action="store_true", help="Two arms, one seed, ten steps: to see that all of it runs."
    )
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2)))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="Only the first so many seeds.")
    parser.add_argument("--part", choices=PARTS, action="append", help="Only these jobs (default: all).")
    parser.add_argument("--teacher-steps", type=int, default=Budget().teacher_steps, help="Of the teacher, in all.")
    parser.add_argument("--stage", choices=("last", "middle"), default="last", help="Which of the tower's features.")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="Of products in training; default: what is faster here."
    )
    parser.add_argument(
        "--below-gate", action="store_true", help="Train students of a teacher that has not learnt enough."
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.basicConfig(format="%(message)s")
    how = {"stage": arguments.stage, "dtype": arguments.dtype or faster_dtype()}
    budget = Budget(**how, **TINY_BUDGET) if arguments.tiny else Budget(**how, teacher_steps=arguments.teacher_steps)
    place = Place(Path(f"build/experiment-photos{'-tiny' if arguments.tiny else ''}"), budget)
    photographs = None if arguments.data == NAME else read_photographs(Path(arguments.data))
    if photographs is not None:
        place = Place(place.root / "folders" / photographs.fingerprint[:16], budget, of_folder=True)
    place.root.mkdir(parents=True, exist_ok=True)
    lock = try_lock(place.root)
    if lock is None:
        sys.exit(f"{place.root}: another experiment is running there; wait for it, or stop it")
    if photographs is not None:
        place.folder.write(photographs)
        sys.stdout.write(
            f"{len(photographs.captions)} pictures of {arguments.data}: all of it is kept in {place.root}\n"
        )
    set_up(place)
    training = train_teacher(place)
    if not (arguments.below_gate or arguments.tiny):
        from tests.benchmarks.experiment_photos_teacher import refuse_below_gate

        refuse_below_gate(training, place.scoring)
    choose_items(place)
    done = {(found["arm"], found["seed"]) for found in read_results(place)}
    wanted = jobs_of(arguments.part or list(PARTS), arguments.seeds)
    if arguments.tiny:
        wanted = [Job(name, SEEDS[0]) for name in TINY]
    jobs = [job for job in wanted if (job.arm, job.seed) not in done]
    parts = Counter(ARMS[job.arm].part for job in jobs)
    hours = expected_hours(parts, read_results(place), arguments.workers)
    sys.stdout.write(f"{len(jobs)} of {len(wanted)} students are to be trained: about {hours:.1f} hours\n")
    names = dict.fromkeys([CACHE, *(ARMS[job.arm].cache for job in wanted)])
    sizes = {name: build_cache(place, name) for name in names}
    make_students(place, {ARMS[job.arm].student for job in jobs})
    failed = run(place, [jobs], run_job, arguments.workers)
    stored = {
        "budget": asdict(place.budget), "training": training, **score_teacher(place), "bytes_a_row": sizes,
        "sinks": count_sinks(place.cache(CACHE)), "gaze": show_gaze(place), "results": in_order(read_results(place)),
    }  # fmt: skip
    publish(place, stored, apart=place.of_folder or arguments.tiny)
    if failed:
        sys.exit("\n".join([f"{len(failed)} jobs failed; the same command runs them again:", *failed]))


if __name__ == "__main__":
    main()

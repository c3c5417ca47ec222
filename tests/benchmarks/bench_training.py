"""Stage two against plain fine-tuning of the same student and the same trainable parts. Part of ``make bench``."""

import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.bench_measure import Spread, Values, Watch, ratio
from tests.benchmarks.bench_models import STUDENT_LAYERS, STUDENT_WIDTH, save_language_model
from tests.benchmarks.train_student import train_student
from vlm_distill_cache.stage2_student.train import AfterStep, TrainResult

LOSSES: dict[str, dict[str, float]] = {
    "SFT": {"lm": 1.0},
    "logits": {"lm": 1.0, "logits": 1.0},
    "logits + answer attention": {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0},
}
TRAINABLE = {"dpt": "projector", "dft": "all"}


def steady(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps after the first third, in which threads, allocator and shards warm up."""
    return log[len(log) // 3 :]


def step_seconds(log: list[dict[str, Any]]) -> float:
    """The median step of a run."""
    return statistics.median(float(record["step_s"]) for record in steady(log))


def waiting_share(log: list[dict[str, Any]]) -> float:
    """Percent of a run's seconds that training waited for data."""
    records = steady(log)
    waited = sum(record["data_wait"] * record["step_s"] for record in records)
    return float(100 * waited / sum(record["step_s"] for record in records))


def in_turn(trainings: Mapping[str, Callable[[AfterStep], Any]]) -> dict[str, list[float]]:
    """Run trainings side by side, one optimizer step of each at a time (A B C A B C ...).

    Runs one after the other drift apart by more than the few percent that are looked for.

    Args:
        trainings: By name; each calls what it is given after every step, and has as many steps as the others.

    Returns:
        `Seconds` of each step but the first, which a training's preparation is part of; of the processor, its thread alone.
    """
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    turns = {name: threading.Semaphore(0) for name in trainings}
    waiting = list(trainings)  # those that are not done, the one that runs first

    def hand_on(name: str, *, done: bool) -> None:
        waiting.remove(name)
        if not done:
            waiting.append(name)
        if waiting:
            turns[waiting[0]].release()

    def run(name: str) -> None:
        torch.set_num_threads(1)
        watch = Watch(thread=True)

        def after_step(*_: object) -> None:
            nonlocal watch
            seconds[name].append(watch.seconds())
            hand_on(name, done=False)
            turns[name].acquire()
            watch = Watch(thread=True)

        turns[name].acquire()
        try:
            trainings[name](after_step)
        finally:
            hand_on(name, done=True)

    with ThreadPoolExecutor(len(trainings)) as pool:
        running = [pool.submit(run, name) for name in trainings]
        turns[waiting[0]].release()
    for one in running:
        one.result()
    return {name: times[1:] for name, times in seconds.items()}


def bench_training(cache: Path, folder: Path, *, steps: int = 90, wider_steps: int = 30) -> tuple[Values, Values]:
    """A step of both distilled phases over one of SFT's, for the built-in student and a wider one. Steps in turn.

    Args:
        cache: Of built-in data, with logits and answer attention.
        folder: Scratch.
        steps: Optimizer steps of each training; the first third only warms up. No sample comes twice: it would be
            taken from memory.
        wider_steps: The same, of the wider student.

    Returns:
        Ratios, whose ends leave out a tenth of the steps on either side, and figures.
    """
    wider = str(save_language_model(folder / "language-model"))
    students: dict[str, dict[str, Any]] = {
        "": {"steps": steps},
        f", student {STUDENT_LAYERS} x {STUDENT_WIDTH}": {"steps": wider_steps, "language_model": wider},
    }
    ratios: Values = {}
    figures: Values = {}
    waits: list[float] = []
    for student, options in students.items():
        for phase in TRAINABLE:
            place = folder / f"{phase}{student}"
            train: Callable[..., TrainResult] = partial(
                train_for_bench, cache=cache, folder=place, phase=phase, **options
            )
            seconds = in_turn({name: partial(train, name) for name in LOSSES})
            kept = {name: times[options["steps"] // 3 :] for name, times in seconds.items()}
            for name in LOSSES:
                if name != "SFT":
                    ratios[f"{phase} step{student}: {name} / SFT"] = step_ratio(kept[name], kept["SFT"])
            figures[f"{phase} step{student}: SFT, ms"] = 1e3 * statistics.median(kept["SFT"])
            # Alone: while others have their turn, data would be loaded for nothing.
            waits.append(waiting_share(train("logits + answer attention").log))
    return ratios, figures | {"data_wait, %": Spread.of(waits)}


def train_for_bench(
    name: str,
    after_step: AfterStep | None = None,
    *,
    cache: Path,
    folder: Path,
    phase: str,
    steps: int,
    language_model: str | None = None,
) -> TrainResult:
    """Train a student for one phase with some losses; what is trained is the phase's."""
    return train_student(
        student="mobilevlm-tiny", language_model=language_model, data="shapes", cache=str(cache), device="cpu",
        phases=[phase], max_length=512, after_step=after_step,
        output=str(folder / f"{name}{'' if after_step else ', alone'}"),
        **{phase: {"steps": steps, "losses": LOSSES[name], "trainable": TRAINABLE[phase]}},
    )  # fmt: skip


def step_ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The ratio of steps taken in turn; single steps are disturbed, so its ends leave out a tenth on either side."""
    pairs = sorted(zip(above, below, strict=True), key=lambda pair: pair[0] / pair[1])
    cut = len(pairs) // 10
    above, below = zip(*pairs[cut : len(pairs) - cut], strict=True)
    return ratio(above, below)

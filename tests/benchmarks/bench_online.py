"""Students from a cache against students with the teacher in the loop, as the released code trains. Part of ``make bench``.

The online way is `experiment_online`: eager attention, every attention matrix, all logits, on the training thread.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_measure import Spread, Values, ratio
from tests.benchmarks.bench_models import SIZES, save_language_model, save_teacher
from tests.benchmarks.bench_training import step_seconds
from tests.benchmarks.experiment_online import train_online
from tests.benchmarks.train_student import train_student
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.planning.open import open_build

STUDENTS = (1, 3, 10)
BATCH = 16
# Equal numbers of visual tokens, as in the released code, and a quarter of them, MobileVLM's own.
TOKENS = {"mlp": "same visual tokens", "ldpnetv2": "a quarter of the visual tokens"}


def students_ratio(online: Sequence[float], cached: Sequence[float], teacher: Sequence[float], students: int) -> Spread:
    """Seconds of training some students online over those of one teacher pass and as many cached trainings.

    Args:
        online: Seconds a sample of a training with the teacher in the loop, of each round.
        cached: The same of a training from the cache.
        teacher: Seconds a sample of stage one.
        students: How many, each of which sees every sample once.
    """
    both = [one + students * each for one, each in zip(teacher, cached, strict=True)]
    return ratio([students * each for each in online], both)


def bench_online(folder: Path, *, rounds: int = 3, steps: int = 9, samples: int = 128) -> tuple[Values, Values]:
    """Steps of both ways in turn, and a teacher pass in each round.

    Args:
        folder: Scratch.
        rounds: Of each.
        steps: Optimizer steps of a training, of 16 samples each; the first third only warms up.
        samples: Of a teacher pass.

    Returns:
        Ratios, and figures.
    """
    teacher, language_model = save_teacher(folder / "teacher"), save_language_model(folder / "language-model")
    passes: list[float] = []
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        config = BuildConfig(
            data="shapes", teacher=str(teacher), cache=str(folder / "cache"), limit=samples, template="short",
            batch_size=BATCH, fidelity_samples=0, threads=1, device="cpu",
        )  # fmt: skip
        summary = extract(config)
        passes.append(summary.seconds / summary.samples)
        for projector in TOKENS:
            options: dict[str, Any] = {
                "student": "mobilevlm-tiny", "language_model": str(language_model), "projector": projector,
                "data": "shapes", "cache": str(folder / "cache"), "output": str(folder / "run"),
                "phases": ["dft"], "max_length": 512, "device": "cpu",
                "dft": {
                    "steps": steps, "batch_size": BATCH,
                    "losses": {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0},
                },
            }  # fmt: skip
            for way in ("cached", "online"):
                shutil.rmtree(folder / "run", ignore_errors=True)
                result = train_student(**options) if way == "cached" else train_online(open_build(config), **options)
                seconds.setdefault((projector, way), []).append(step_seconds(result.log) / BATCH)
    ratios: Values = {}
    figures: Values = {"teacher pass, ms a sample": Spread.of(1e3 * each for each in passes)}
    for projector, tokens in TOKENS.items():
        online, cached = seconds[projector, "online"], seconds[projector, "cached"]
        ratios[f"step: online / cached, {tokens} ({SIZES})"] = ratio(online, cached)
        for students in STUDENTS:
            name = f"{students} student{'s' if students > 1 else ''}, one epoch: online / cached with its teacher pass"
            ratios[f"{name}, {tokens}"] = students_ratio(online, cached, passes, students)
        for way in ("cached", "online"):
            figures[f"step: {way}, {tokens}, ms a sample"] = Spread.of(1e3 * each for each in seconds[projector, way])
    return ratios, figures

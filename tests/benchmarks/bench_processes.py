"""One process against two, of either stage, with one thread each. Part of ``make bench``."""

import os
import shutil
import statistics
import time
from pathlib import Path
from unittest import mock

from tests.benchmarks.bench_measure import Spread, Values, ratio
from tests.benchmarks.bench_models import save_language_model, save_teacher
from tests.benchmarks.bench_training import steady
from vlm_distill_cache.common.cache.plan import SHARDS
from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract_with_processes
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.run import train_arm
from vlm_distill_cache.stage2_student.training.log import read_log

PROCESSES = (1, 2)


def finishing_rate(finished: list[float], shard_size: int) -> float:
    """Samples a second between the first finished shard and the last, which leaves out how processes start.

    Args:
        finished: When each shard was, in seconds; two shards or more, in any order.
        shard_size: Samples of each.
    """
    return (len(finished) - 1) * shard_size / (max(finished) - min(finished))


def bench_processes(folder: Path, *, rounds: int = 3, samples: int = 128, steps: int = 12) -> tuple[Values, Values]:
    """Samples a second of one process and of two, in turn.

    Args:
        folder: Scratch.
        rounds: Runs of each.
        samples: Of a stage-one run.
        steps: Optimizer steps of a stage-two run.

    Returns:
        Ratios, and figures.
    """
    teacher, language_model = save_teacher(folder / "teacher"), save_language_model(folder / "language-model")
    speeds: dict[tuple[int, int], list[float]] = {(stage, n): [] for stage in (1, 2) for n in PROCESSES}
    whole: dict[int, list[float]] = {n: [] for n in PROCESSES}
    # Processes started by torch's launcher get one thread; so does the single one, and stage one's.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        for _ in range(rounds):
            for processes in PROCESSES:
                cache = folder / "cache"
                shutil.rmtree(cache, ignore_errors=True)
                config = BuildConfig(
                    data="shapes", teacher=str(teacher), cache=str(cache), limit=samples, template="short",
                    batch_size=16, shard_size=16, fidelity_samples=0, threads=1, device="cpu",
                )  # fmt: skip
                started = time.perf_counter()
                extract_with_processes(config, processes)
                whole[processes].append(time.perf_counter() - started)
                finished = [path.stat().st_mtime for path in (cache / SHARDS).glob("*.json")]
                speeds[1, processes].append(finishing_rate(finished, config.shard_size))
            for processes in PROCESSES:
                run = folder / "run"
                shutil.rmtree(run, ignore_errors=True)
                options = {
                    "student": "mobilevlm-tiny", "language_model": str(language_model), "projector": "mlp",
                    "data": "shapes", "cache": str(folder / "cache"), "output": str(run), "phases": ["dft"],
                    "max_length": 512, "device": "cpu",
                    "dft": {"steps": steps, "batch_size": 16, "losses": {"lm": 1.0, "logits": 1.0}},
                }  # fmt: skip
                train_arm(config_from_dict(TrainConfig, options, where="bench_processes"), processes=processes)
                rates = [record["samples_per_s"] for record in steady(read_log(run))]
                speeds[2, processes].append(statistics.median(rates))
    ratios: Values = {
        f"stage {'one' if stage == 1 else 'two'}, 2 processes / 1, samples/s": ratio(speeds[stage, 2], speeds[stage, 1])
        for stage in (1, 2)
    }
    figures: Values = {
        f"stage one, {samples} samples, {processes} process{'es' if processes > 1 else ''}, start included, s": Spread.of(
            spent
        )
        for processes, spent in whole.items()
    }
    return ratios, figures

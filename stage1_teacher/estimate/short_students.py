"""Short students of ``teacher-cache advise``: one a set of logits, trained and scored by ``distill`` in processes of its own.

The stages do not know each other's code: caches are handed over as folders, scores come back as JSON.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.codecs.logits import LOGIT_PRESETS, LogitCodec
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.terminal.command_line import run_command, said_so_far
from vlm_distill_cache.common.terminal.next_step import DEFAULT_SIGNALS
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.estimate.advise import Measured, Options
from vlm_distill_cache.stage1_teacher.planning.open import open_build
from vlm_distill_cache.stage1_teacher.planning.preview import write_sketch

DISTILL = (sys.executable, "-m", "vlm_distill_cache.stage2_student.cli")
SHOWN = ("likelihood", "questions", "teacher/top1", "teacher/kl")
JUDGE = "exact"  # the set whose cache all students are compared with
PHASE = "dft"
ITEMS = 300  # held-out items that each is scored on


def refuse_student(
    config: BuildConfig, folder: Path, *, student: str, steps: int, eval_data: str | None, overrides: Sequence[str]
) -> None:
    """Notice before the teacher runs what would stop short students, by a dry run of ``distill`` on what a cache would say.

    Args:
        folder: A folder for that; the others as of `score_students`.

    Raises:
        ConfigError: If no student could be trained; its own message stands above.
    """
    _refuse_no_logits(config)
    if eval_data:
        open_dataset(eval_data)
    sketch = folder / "sketch"
    write_sketch(open_build(config, loads=False), sketch)
    words = _train_words(config, student=student, steps=steps, overrides=overrides)
    _distill(*words, "--cache", str(sketch), "--output", str(folder / "none"), "--dry-run", "--sketch", str(sketch))


def score_students(
    measured: Measured,
    folder: Path,
    *,
    student: str,
    steps: int,
    eval_data: str | None,
    overrides: Sequence[str],
    chosen: Options,
) -> dict[str, Any]:
    """Train a short student on each preset's cache of the probe, with one seed, and score them on the same items.

    Args:
        folder: An empty one for caches and students.
        student: As ``distill train --student`` takes it.
        steps: Optimizer steps of the one phase.
        eval_data: Held-out items; None: those of the data.
        overrides: Further options of ``distill train``.
        chosen: Options that were recommended; their logits are among the sets, as are those of the command.

    Returns:
        By the name of the set, scores as ``distill evaluate`` writes them.

    Raises:
        ConfigError: If the cache would hold no logits, or a student cannot be trained; its own message stands above.
    """
    config, option = measured.config, LogitCodec.signal
    _refuse_no_logits(config)
    names = dict.fromkeys((JUDGE, *LOGIT_PRESETS, config.logits, chosen[option]))
    words = _train_words(config, student=student, steps=steps, overrides=overrides)
    scores = {}
    for number, name in enumerate(names):
        cache, output = folder / f"cache-{number}", folder / f"student-{number}"
        cache.mkdir()
        measured.write_cache(cache, {option: name})
        _distill(*words, "--cache", str(cache), "--output", str(output))
        found = folder / f"scores-{number}.json"
        items = ["--data", eval_data] if eval_data else []
        _distill("evaluate", str(output / "final"), *items, "--limit", str(ITEMS), "--cache", str(folder / "cache-0"),
                 "--output", str(found))  # fmt: skip
        scores[f"{option}={name}"] = read_json(found)["scores"]
    return scores


def _refuse_no_logits(config: BuildConfig) -> None:
    if LogitCodec.signal not in config.signals:
        raise ConfigError("--student: students are compared by the logits they learn; add them to --signals")


def _train_words(config: BuildConfig, *, student: str, steps: int, overrides: Sequence[str]) -> list[str]:
    """The `distill train` of a short student, without its cache and its output."""
    data = ["--data", config.data, *(["--images", config.images] if config.images else [])]
    unserved = [f"{PHASE}.losses.{name}=0" for name in DEFAULT_SIGNALS if name not in config.signals]
    # All of the probe, whatever the student's preset takes of whole data.
    options = ("data_share=1.0", f"{PHASE}.steps={steps}", *unserved, *overrides)
    given = [word for entry in options for word in ("--set", entry)]
    return ["train", "--student", student, *data, "--phases", PHASE, *given]


def _distill(*words: str) -> None:
    if run_command([*DISTILL, *words], {**os.environ, **said_so_far()}, output=subprocess.DEVNULL):
        raise ConfigError(
            f"distill {words[0]} of a short student failed; see its message above, or leave --student out"
        )


def score_lines(scores: Mapping[str, Any]) -> dict[str, list[str]]:
    """The scores of each set as texts, with their 95 % intervals."""
    return {
        name: [
            f"{kind} {found[kind]['value']:.4g} [{found[kind]['low']:.4g}, {found[kind]['high']:.4g}]"
            for kind in SHOWN if kind in found
        ]
        for name, found in scores.items()
    }  # fmt: skip

"""`distill run`: baseline and distilled student, their scores, one report; done once, resumed if killed.

The first thing is to see whether there is anything to do. That path imports no torch: a second call answers
in well under two seconds. ``OUTPUT/run.json`` says what the folder belongs to and whether it is finished.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_distill_cache.common.cache.documents import describe_differences
from vlm_distill_cache.common.cache.manifest import read_manifest, read_plan
from vlm_distill_cache.common.config import config_from_dict, config_to_dict, save_config
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.atomic import clean_stale, read_json, write_bytes_atomic, write_json_atomic
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.locations import public_location
from vlm_distill_cache.common.remotes.mirror import local_folder
from vlm_distill_cache.common.terminal.command_line import run_command
from vlm_distill_cache.stage2_student.config import PHASE_NAMES, TrainConfig, describe, without_teacher
from vlm_distill_cache.stage2_student.pruned_folder import FOLDER, kept_share
from vlm_distill_cache.stage2_student.resolve import resolve_config
from vlm_distill_cache.stage2_student.training.output_folder import claim_output, holds_anything

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vlm_distill_cache.stage2_student.scores.evaluate import EvaluationReport

STAMP, TABLE, REPORT, SCORES = "run.json", "table.txt", "report.html", "evaluation.json"
BASELINE, DISTILLED, TEACHER = "sft", "distilled", "teacher"
ARM = "DISTILL_ARM"  # set in the processes of a run's student: what comes next is the run's to say
FINAL, PROVENANCE = "final", "distillation.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run left.

    Attributes:
        output: Its folder.
        table: Scores side by side, as text.
        report: The HTML page.
        fresh: False if everything was there already.
        seconds: Of this call.
    """

    output: Path
    table: str
    report: Path
    fresh: bool
    seconds: float


def load_run_config(path: Path | None, overrides: Sequence[str], *, cache: str | Path) -> TrainConfig:
    """Resolve a run's configuration: preset by the cache's teacher, then YAML, then overrides."""
    width = int(read_plan(local_folder(cache)).teacher.get("hidden_size", 1 << 20))
    return resolve_config(path, [*overrides, f"cache={json.dumps(str(cache))}"], teacher_width=width)


def hash_caches(config: TrainConfig) -> dict[str, str]:
    """The manifest hash of each cache a configuration names, by path or address.

    Raises:
        CacheFormatError: If one is not sealed or not a cache.
    """
    paths = {str(config.phase(name).cache) for name in config.phases}
    return {path: read_manifest(local_folder(path)).hash for path in sorted(paths)}


def cache_folders(config: TrainConfig) -> list[Path]:
    """The folders of the caches a configuration names; of an address, its local mirror."""
    return [local_folder(path) for path in hash_caches(config)]


def run(config: TrainConfig, *, processes: int = 1, say: Callable[[str], None] = _log.info) -> RunSummary:
    """Train the SFT baseline and the distilled student, score both, write the report.

    Whatever is finished is not done again: a complete run, a trained student, a training's checkpoints, a
    score.

    Args:
        config: Of the distilled student; ``output`` gets a folder for each student.
        processes: Training processes; more than one are started with torch's launcher.
        say: Told what happens.

    Returns:
        The summary.

    Raises:
        ConfigError: If the folder belongs to another run, naming what differs.
        CacheMismatchError: If the cache fits neither data nor student.
    """
    began = time.monotonic()
    output = Path(config.output)
    stamp = {"run": describe(config, hash_caches(config)), "evaluation": config_to_dict(config)["evaluation"]}
    previous = read_stamp(output)
    refuse_other_run(output, previous, stamp)
    if previous.get("finished") == fingerprint(stamp) and (output / REPORT).is_file():
        table = (output / TABLE).read_text()
        return RunSummary(
            output=output, table=table, report=output / REPORT, fresh=False, seconds=time.monotonic() - began
        )
    set_up_libraries()
    with claim_output(output, *cache_folders(config)):
        for name in (BASELINE, DISTILLED):
            clean_stale(output / name)  # of a process killed while it scored
        table = train_and_score(config, stamp, processes=processes, say=say)
    return RunSummary(output=output, table=table, report=output / REPORT, fresh=True, seconds=time.monotonic() - began)


def train_and_score(
    config: TrainConfig, stamp: Mapping[str, Any], *, processes: int, say: Callable[[str], None]
) -> str:
    """Do what is left of a run whose folder is held; returns the table of scores."""
    from vlm_distill_cache.stage2_student.scores.held_out import probe_items
    from vlm_distill_cache.stage2_student.training.checks import check_losses
    from vlm_distill_cache.stage2_student.training.preparation import failure_notes, open_caches, prepare

    output = Path(config.output)
    caches = open_caches(config)
    check_losses(config, caches)  # else a misfit of the distilled student shows when the baseline is trained
    for note in failure_notes(caches):
        say(note)
    notes = probe_items(config)
    for note in notes:
        say(f"note: {note}")
    state = {**stamp, "config": config_to_dict(config), "notes": notes}
    write_json_atomic(output / STAMP, {**state, "finished": None})
    trained = arms(with_pruned_student(config, say=say))
    if not any((output / name / FINAL / PROVENANCE).is_file() for name in trained):
        prepare(trained[DISTILLED])  # what only its student shows to be wrong, before hours go into the baseline
    for name, arm in trained.items():
        if (output / name / FINAL / PROVENANCE).is_file():
            say(f"{name}: trained already")
            continue
        say(f"{name}: training {describe_phases(arm)}")
        hold_and_train(arm, processes=processes)
    scores = {name: evaluate_arm(output / name, config, say=say) for name in arms(config)}
    teacher = teacher_scores(local_folder(config.cache))
    table = write_results(output, scores if teacher is None else {**scores, TEACHER: teacher}, notes)
    write_report(output, config)
    write_json_atomic(output / STAMP, {**state, "finished": fingerprint(stamp)})
    return table


def hold_and_train(arm: TrainConfig, *, processes: int) -> None:
    """Train one student in a folder that no other process may train in; launched processes hold it themselves."""
    with nullcontext() if processes > 1 else claim_output(Path(arm.output)):
        train_arm(arm, processes=processes)


def arms(config: TrainConfig) -> dict[str, TrainConfig]:
    """The students of a run, by the name of their folder."""
    return {
        BASELINE: replace(without_teacher(config), output=str(Path(config.output) / BASELINE)),
        DISTILLED: replace(config, output=str(Path(config.output) / DISTILLED)),
    }


def with_pruned_student(config: TrainConfig, *, say: Callable[[str], None] = _log.info) -> TrainConfig:
    """Cut a student ``pruned:KEEP`` out of its teacher into the run's folder, once; others are as they are.

    Args:
        config: Of a run that holds its folder.
        say: Told what happens.

    Returns:
        The configuration with the pruned folder as its student.

    Raises:
        ConfigError: If the cache's data cannot be opened.
        ModelError: If the teacher cannot be pruned, or is not the cache's.
    """
    keep = kept_share(config.student)
    if keep is None:
        return config
    folder = Path(config.output) / FOLDER
    if folder.is_dir():
        say(f"{config.student}: cut out of {config.teacher} already")
    else:
        from vlm_distill_cache.stage2_student.prune.for_run import prune_for_cache  # torch

        say(f"{config.student}: cutting it out of {config.teacher}")
        say(prune_for_cache(config, folder, keep=keep))
    return replace(config, student=str(folder))


def train_arm(arm: TrainConfig, *, processes: int) -> None:
    """Train one student here, or in processes of their own.

    Raises:
        ConfigError: If a process failed; its own message stands above.
    """
    if processes == 1:
        from vlm_distill_cache.stage2_student.train import (
            train,  # torch: only when there is something to train
        )

        train(arm)
        return
    folder = Path(arm.output)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(arm, folder / "config.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    ours = ["-m", "vlm_distill_cache.stage2_student.cli", "train", "--config", str(folder / "config.yaml")]
    command = [*launcher, *ours, "--cache", arm.cache, "--output", arm.output]
    if run_command(command, {**os.environ, ARM: "1"}):
        raise ConfigError(f"training of {folder} in {processes} processes failed; see the messages above")


def describe_phases(config: TrainConfig) -> str:
    """A line such as ``dpt 60 steps (lm + logits), dft 400 steps (...)``."""
    parts = []
    for name in config.phases:
        phase = config.phase(name)
        length = f"{phase.steps} steps" if phase.steps is not None else f"{phase.epochs:g} epochs"
        parts.append(f"{name} {length} ({' + '.join(phase.losses.active())})")
    return ", ".join(parts)


def read_stamp(output: Path) -> dict[str, Any]:
    """What a folder belongs to; empty for a new one.

    Raises:
        ConfigError: If it holds other things than a run.
    """
    try:
        stamp = read_json(output / STAMP)
    except FileNotFoundError:
        if holds_anything(output):
            raise ConfigError(
                f"{output} is not empty and holds no {STAMP}: it is not the folder of a run; give another --output"
            ) from None
        return {}
    except CacheFormatError as error:
        raise ConfigError(f"{error}; give another --output, or delete {output} to begin again") from error
    return stamp if isinstance(stamp, dict) else {}


def refuse_other_run(output: Path, previous: Mapping[str, Any], stamp: Mapping[str, Any]) -> None:
    """Refuse to mix two runs in one folder; another way of scoring is fine, students are scored again then.

    Raises:
        ConfigError: Naming each differing option with both values, and the remedy.
    """
    made = [output / name / part for name in (BASELINE, DISTILLED) for part in ("checkpoints", FINAL)]
    if not previous or not any(path.exists() for path in (*made, output / FOLDER)):  # FOLDER: a student cut out
        return
    lines = describe_differences(previous.get("run", {}), stamp["run"], there="the folder", here="this run")
    if lines:
        raise ConfigError(
            f"{output} belongs to a run with other options:\n" + "\n".join(lines) + "\n"
            "Use the same options, another --output (OUTPUT=...), or delete that folder to begin again"
        )


def evaluate_arm(folder: Path, config: TrainConfig, *, say: Callable[[str], None] = _log.info) -> EvaluationReport:
    """Score one student of a run, or read its scores if they are of this student and these items."""
    from vlm_distill_cache.stage2_student.scores.evaluate import EvaluationReport
    from vlm_distill_cache.stage2_student.trained_student import evaluate_student, open_student

    trained = read_json(folder / FINAL / PROVENANCE)["fingerprint"]
    what = fingerprint({"student": trained, "evaluation": config_to_dict(config)["evaluation"]})
    path = folder / SCORES
    if path.is_file():
        stored = read_json(path)
        if stored.get("of") == what:
            return EvaluationReport.from_dict(stored)
    say(f"{folder.name}: scoring")
    report = evaluate_student(open_student(folder / FINAL), config)
    write_json_atomic(path, {"of": what, **report.to_dict()})
    return report


def teacher_scores(cache: Path) -> EvaluationReport | None:
    """The teacher's own scores, if whoever built the cache put them into its plan."""
    from vlm_distill_cache.stage2_student.scores.evaluate import EvaluationReport

    scores = read_plan(cache).teacher.get("evaluation")
    return None if scores is None else EvaluationReport.from_dict(scores)


def write_results(output: Path, scores: Mapping[str, EvaluationReport], notes: Sequence[str]) -> str:
    """Write the table and what it does not tell, as text and as JSON; returns the text."""
    from vlm_distill_cache.stage2_student.scores.evaluate import render_table

    table = "\n".join([render_table(scores), *(f"note: {note}" for note in notes)])
    write_json_atomic(output / SCORES, {name: report.to_dict() for name, report in scores.items()})
    write_bytes_atomic(output / TABLE, table.encode())
    return table


def write_report(output: Path, config: TrainConfig) -> Path:
    """Write the HTML page of a run: logs, scores and, if the cache is there, attention pictures."""
    from vlm_distill_cache.stage2_student.scores.evaluate import EvaluationReport
    from vlm_distill_cache.stage2_student.scores.report import render_report
    from vlm_distill_cache.stage2_student.trained_student import draw_overlays, open_student
    from vlm_distill_cache.stage2_student.training.log import read_log

    stored = read_json(output / SCORES)
    overlays = draw_overlays(open_student(output / DISTILLED / FINAL), config)
    curves = {name: read_log(output / name) for name in arms(config)}
    logged = [record for record in curves[DISTILLED] if "samples_per_s" in record]
    plan = read_plan(local_folder(config.cache))
    seconds = sum(record["step_s"] for record in logged)
    facts = {
        "student": config.student,
        "teacher": f"{plan.teacher.get('name')} (not loaded: its signals come from the cache)",
        "cache": f"{public_location(config.cache)} ({', '.join(sorted(plan.signals))})",
        "data": str(plan.data.get("name")),
        "phases": describe_phases(config),
        "training": f"{len(logged)} steps in {seconds:.0f} s",
        "seed": str(config.seed),
    }
    counted = read_json(output / DISTILLED / FINAL / PROVENANCE).get("vocabulary", {})
    if counted.get("entries_beyond"):
        facts["vocabulary"] = (
            f"{counted['entries_beyond']} of {counted['entries_read']} cached logit entries read are tokens beyond "
            "the student's rows; they count as tail"
        )
    render_report(
        output / REPORT,
        title=f"{config.student}: distilled from a teacher cache",
        facts=facts,
        curves=curves,
        evaluations={
            name: EvaluationReport.from_dict(stored[name]) for name in (BASELINE, DISTILLED, TEACHER) if name in stored
        },
        overlays=overlays,
        notes=read_stamp(output).get("notes", []),
    )
    return output / REPORT


def set_up_libraries() -> None:
    """Leave a core for loading, and switch off the libraries' own progress bars and a warning about speed."""
    from transformers.utils import logging as transformers_logging

    from vlm_distill_cache.data.threads import leave_one_core

    leave_one_core()
    # Each process of several would say so once; a convolution's gradient is then copied, which changes no value.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    transformers_logging.disable_progress_bar()


def read_run_config(output: Path) -> TrainConfig:
    """The configuration of a run's folder.

    Raises:
        ConfigError: If there is none.
    """
    stamp = read_stamp(output)
    if "config" not in stamp:
        raise ConfigError(f"{output}: no run there ({STAMP}); give the folder that `distill run` wrote")
    return config_from_dict(TrainConfig, stamp["config"], where=str(output / STAMP))


def phases_override(text: str) -> str:
    """``"dpt dft"`` or ``"dpt,dft"`` as an override.

    Raises:
        ConfigError: If a phase is unknown.
    """
    names = text.replace(",", " ").split()
    for name in names:
        if name not in PHASE_NAMES:
            raise ConfigError(f"phases: {name!r} is none of {', '.join(PHASE_NAMES)}")
    return f"phases=[{', '.join(names)}]"

"""``distill submit``: a training that an engine starts. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vlm_distill_cache.common.config import last_given
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.terminal.command_line import shared_options, tell
from vlm_distill_cache.common.terminal.engines.command import start_workers, take_engine
from vlm_distill_cache.common.terminal.engines.jobs import submissions
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.pruned_folder import refuse_uncut
from vlm_distill_cache.stage2_student.training.resolve import given_options

_MODULE = "vlm_distill_cache.stage2_student.cli"
_LAUNCHER = "vlm_distill_cache.stage2_student.training.several"

TRAINING_JOB = shared_options(
    click.option(
        "--job",
        type=click.Choice(["train", "run"]),
        default="train",
        show_default=True,
        help="train: one student; run: the baseline `sft`, too, and their scores.",
    ),
    click.option(
        "--nproc", type=click.IntRange(min=1), help="Training processes on each machine; default: one for each GPU."
    ),
    click.option(
        "--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines (train by slurm)."
    ),
    click.option("--teacher", help="With --job run: the teacher that a student pruned:KEEP is cut out of."),
)


def submit_training(
    options: dict[str, Any],
    *,
    given: Callable[[dict[str, Any]], tuple[Path | None, list[str], str]],
    load: Callable[[dict[str, Any]], tuple[TrainConfig, str]],
) -> dict[str, Any]:
    """Hand a training to an engine; it resumes by itself when the engine starts it again.

    Args:
        options: Of the command.
        given: From them to the YAML file, all others as ``a.b=c``, and the cache.
        load: From them to a configuration, of a cache that is there.

    Raises:
        ConfigError: As `start_workers`, or for options that cannot be used.
        click.UsageError: For options that do not go together.
    """
    engine = take_engine(options)
    job, nproc, nodes, extend, dry_run = (options.pop(name) for name in ("job", "nproc", "nodes", "extend", "dry_run"))
    if options.pop("sketch") is not None:
        raise click.UsageError("--sketch goes with `distill train --dry-run` and `distill run --dry-run`")
    if job == "train" and options["teacher"] is not None:
        raise click.UsageError("--teacher goes with --job run")
    if nodes > 1 and (engine.name, job) != ("slurm", "train"):
        raise click.UsageError("--nodes goes with --engine slurm and --job train; others run on one machine")
    config, settings, cache = given(dict(options))
    if not Path(cache).exists() and submissions(cache):
        output = last_given(given_options(config, settings)[1], "output")
        tell(f"{cache} is not there yet, but submitted: the training's options are checked when it starts")
    else:
        resolved, _ = load(dict(options))
        output = resolved.output
        if job == "train":
            refuse_uncut(resolved.student, resolved.teacher)
    if not output:
        raise ConfigError("output: none is given; add --output FOLDER, or output: FOLDER to the file of --config")
    processes = nproc or max(1, engine.gpus)
    torch = [_LAUNCHER, f"--nproc_per_node={processes}", *(["--standalone"] if nodes == 1 else []), "-m"]
    behind = ["--cache", cache, *(["--extend"] if extend else [])]
    return start_workers(
        engine,
        [*(torch if job == "train" else []), _MODULE, job],
        options=(config, settings),
        behind=[*behind, *(["--nproc", str(processes)] if job == "run" else [])],
        place=output,
        name="distill",
        job={"nodes": nodes, "processes": processes},
        dry_run=dry_run,
    )

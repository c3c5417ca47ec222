"""What ``teacher-cache submit`` and ``distill submit`` do with the options that are the engine's (`options`)."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.yaml_text import YamlError, parse_yaml
from vlm_distill_cache.common.printing import hide_secrets
from vlm_distill_cache.common.terminal.command_line import quoted, say, tell
from vlm_distill_cache.common.terminal.engines.jobs import Job, new_folder, write_record
from vlm_distill_cache.common.terminal.engines.on_ray import NEW, connect_to_ray, run_on_ray
from vlm_distill_cache.common.terminal.engines.on_slurm import submit_to_slurm
from vlm_distill_cache.common.terminal.engines.options import HOURS, PACKAGES

# Of sbatch and of Ray, that options here are for
_OURS = {
    "time": "--hours", "nodes": "--nodes", "gpus_per_node": "--gpus", "cpus_per_task": "--cpus",
    "array": "--workers", "ntasks": "--workers", "ntasks_per_node": "--workers",
    "num_cpus": "--cpus", "num_gpus": "--gpus", "max_retries": "--restarts",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What the engine's options say."""

    name: str
    gpus: int
    cpus: int
    hours: float
    restarts: int
    address: str | None
    environment: Mapping[str, str]
    prefix: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def python(self) -> tuple[str, ...]:
        """What begins a worker's command: this Python, or the one that stands behind the prefix."""
        return (*self.prefix, "python") if self.prefix else (sys.executable,)


def take_engine(options: dict[str, Any]) -> Engine:
    """The engine's options, which are taken out of all.

    Raises:
        ConfigError: If the engine's package is not installed.
        click.UsageError: For an option of the other engine, or one that cannot be read.
    """
    name, hours, address = (options.pop(key) for key in ("engine", "hours", "address"))
    variables, settings = (
        dict(_pair(text, flag) for text in options.pop(key))
        for key, flag in (("env", "--env"), ("engine_set", "--engine-set"))
    )
    if name == "ray" and hours is not None:
        raise click.UsageError("--hours goes with --engine slurm: Ray ends no worker")
    if name == "slurm" and address is not None:
        raise click.UsageError("--address goes with --engine ray: SLURM is found by `sbatch`")
    settings = {key.replace("-", "_"): value for key, value in settings.items()}
    for key in settings.keys() & _OURS.keys():
        there = any(_OURS[key] in param.opts for param in click.get_current_context().command.params)
        instead = f"give {_OURS[key]} in its place" if there else "this command says it itself; leave it out"
        raise click.UsageError(f"--engine-set {key}: {instead}")
    try:
        prefix = tuple(shlex.split(options.pop("prefix")))
    except ValueError as error:
        raise click.UsageError(f"--prefix: {error}") from error
    if importlib.util.find_spec(PACKAGES[name]) is None:
        raise ConfigError(
            f"--engine {name} needs {PACKAGES[name]}, which is not installed: run `pip install 'vlm-distill-cache[{name}]'`"
        )
    return Engine(
        name=name,
        gpus=options.pop("gpus"),
        cpus=options.pop("cpus"),
        hours=hours or HOURS,
        restarts=options.pop("restarts"),
        address=address,
        environment=variables,
        prefix=prefix,
        settings=settings if name == "slurm" else {key: _value(text, key) for key, text in settings.items()},
    )


def _pair(text: str, flag: str) -> tuple[str, Any]:
    """NAME=VALUE; of the engine's options, NAME alone is a switch."""
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) or not (equals or flag == "--engine-set"):
        raise click.UsageError(f"{flag} {text!r}: expected NAME=VALUE")
    return name, value if equals else True


def _value(text: str, key: str) -> Any:
    try:
        return parse_yaml(text) if isinstance(text, str) else text
    except YamlError as error:
        raise click.UsageError(f"--engine-set {key}: {error}") from error


def start_workers(
    engine: Engine,
    words: Sequence[str],
    *,
    options: tuple[Path | None, Sequence[str]],
    behind: Sequence[str],
    place: str,
    name: str,
    job: Mapping[str, int],
    dry_run: bool,
) -> dict[str, Any]:
    """Record workers beside what they make, and hand them to the engine; with Ray, wait until they have ended.

    Args:
        words: Behind ``python -m`` of each: module and command.
        options: Their YAML file, of which they get a copy, and all others that the command's ``--set`` takes.
        behind: What else stands in the command.
        place: The cache, or the student's folder.
        name: What the engine calls them.
        job: How many there are: fields of a `Job`.
        dry_run: Only say what would be started.

    Returns:
        What was started, for programs.

    Raises:
        ConfigError: If the engine cannot be reached, or refuses.
        ProcessFailedError: With Ray, if no worker came to a good end.
    """
    config, given = options
    folder = new_folder(place)
    kept = folder / "options.yaml"
    file = [] if config is None else ["--config", str(kept)]
    settings = [word for setting in given for word in ("--set", setting)]
    asked = Job(
        name=name,
        command=(*engine.python, "-m", *words, *file, *settings, *behind),
        folder=folder,
        directory=Path.cwd(),
        environment=engine.environment,
        gpus=engine.gpus,
        cpus=engine.cpus,
        restarts=engine.restarts,
        alone=not engine.prefix,
        settings=engine.settings,
        **job,
    )
    told = {"engine": engine.name, "workers": asked.workers, "command": [hide_secrets(word) for word in asked.command]}
    told |= {"directory": asked.directory, "logs": folder}
    _say_what(asked, engine, config)
    if dry_run:
        say("Dry run: nothing was started")
        return told
    if config is not None and not config.is_file():
        raise ConfigError(f"--config {config}: is no file that can be kept for the workers; write the options to one")
    folder.mkdir(parents=True, mode=0o700)  # submitit's files hold variables, too, and are run
    try:
        if config is not None:
            shutil.copyfile(config, kept)
        number, where = "", ""
        if engine.name == "slurm":
            number = submit_to_slurm(asked, hours=engine.hours)
        else:
            where = connect_to_ray(engine.address)
    except ConfigError:  # nothing was started, and nothing of it is left
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
        raise
    if engine.name == "slurm":
        write_record(asked, engine=engine.name, identity=f"job {number}", stop=f"`scancel {number}` ends it")
        say(f"Submitted as job {number}: {quoted(folder / f'{number}_submission.sh')}")
        tell(f"`squeue --job {number}` and {_watch(place, name)} say how far it is; `scancel {number}` ends it")
        return told | {"job": number}
    tell(f"Ray cluster: {where}")
    write_record(asked, engine=engine.name, identity=where, stop="it ends with the command that started it")
    tell(f"{_watch(place, name)} says how far it is; Ctrl-C ends the workers, and the same command goes on")
    run_on_ray(asked, new=where == NEW, say=tell)
    return told


def _watch(place: str, name: str) -> str:
    return (
        f"`teacher-cache status {quoted(place)}`" if name == "teacher-cache" else f"{quoted(new_folder(place).parent)}"
    )


def _say_what(job: Job, engine: Engine, config: Path | None) -> None:
    each = f"{job.nodes} machines with " if job.nodes > 1 else ""
    limit = f", {engine.hours:g} hours" if engine.name == "slurm" else ""
    count = f"{job.workers} worker{'' if job.workers == 1 else 's'}"
    say(f"{count} by {engine.name}, each: {each}{job.gpus} GPUs, {job.cpus} CPUs{limit}")
    say(f"  runs: {' '.join(quoted(word) if not word.startswith('-') else word for word in job.command)}")
    say(f"  in: {job.directory}")
    if job.environment:
        say(f"  variables: {', '.join(job.environment)}")
    if job.settings:
        say(f"  options of {engine.name}: {', '.join(f'{key}={value}' for key, value in job.settings.items())}")
    say(f"  logs: {quoted(job.folder)}/worker-*.log" + ("" if config is None else f"; options.yaml there is {config}"))

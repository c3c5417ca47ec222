"""``teacher-cache``: build a cache, measure its fidelity, seal it, report on it, train a built-in teacher."""

from __future__ import annotations

import errno
import json
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.command_line import SETTINGS, CommandGroup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stage1_teacher.config import BuildConfig

# Imports that pull torch in are inside the commands, so that --help and usage errors are instant.


@click.group(cls=CommandGroup, context_settings=SETTINGS)
def main() -> None:
    """Stage one: run the teacher once over a data set and keep what students need."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _build_options(command: Any) -> Any:
    """Options that `build` and `fidelity` share."""
    for option in (
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any other option; repeatable."
        ),
        click.option("--limit", type=click.IntRange(min=1), help="Use only the first samples."),
        click.option(
            "--signals", help="Comma-separated: logits, answer_attention, visual_columns, visual_map."
        ),
        click.option("--store", type=click.Choice(["zarr", "webdataset"]), help="Shard format."),
        click.option("--cache", help="Folder of the cache."),
        click.option(
            "--teacher", help="Checkpoint directory; default: the built-in teacher of built-in data."
        ),
        click.option("--images", help="Image folder of a .json or .jsonl; default: the file's own folder."),
        click.option(
            "--data", help="shapes, easy-vqa, or a path: LLaVA .json, messages .jsonl, datasets folder, tars."
        ),
        click.option(
            "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="YAML file."
        ),
    ):
        command = option(command)
    return command


def _settings(config: Path | None, overrides: tuple[str, ...], options: dict[str, Any]) -> BuildConfig:
    from common.config import load_config
    from stage1_teacher.config import BuildConfig

    given = [
        f"{name}={json.dumps(value)}"
        for name, value in options.items()
        if value is not None and name != "signals"
    ]
    if options["signals"] is not None:
        given.append(f"signals=[{options['signals']}]")
    return load_config(BuildConfig, config, [*overrides, *given])


@main.command()
@_build_options
@click.option("--overwrite", is_flag=True, help="Start again if the folder holds a cache with other options.")
def build(config: Path | None, overrides: tuple[str, ...], *, overwrite: bool, **options: Any) -> None:
    """Build a cache, or resume one; says so and ends when it is complete."""
    settings = _settings(config, overrides, options)

    from stage1_teacher.extract import extract
    from stage1_teacher.report import next_command, summary_text

    _quiet_libraries()
    with _explain_full_disk(settings.cache):
        summary = extract(settings, overwrite=overwrite)
    click.echo(summary_text(summary))
    click.echo(next_command(summary, settings))


@main.command()
@_build_options
@click.option(
    "--samples", type=click.IntRange(min=1), default=64, show_default=True, help="Size of the probe."
)
def fidelity(config: Path | None, overrides: tuple[str, ...], *, samples: int, **options: Any) -> None:
    """Compare a finished cache with its live teacher again; takes the options it was built with."""
    settings = _settings(config, overrides, options)

    from stage1_teacher.extract import recompute_fidelity

    _quiet_libraries()
    with _explain_full_disk(settings.cache):
        measured = recompute_fidelity(settings, samples=samples).fidelity or {}
    for name, value in measured.items():
        click.echo(f"  {name:<44}{value:>14}")


@contextmanager
def _explain_full_disk(cache: str) -> Iterator[None]:
    """Say where the disk is full and what to do: the system's own error names neither."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "finished shards are kept; free space, then run the same command again"
        raise OSError(error.errno, f"the disk is full ({error.strerror}); {remedy}", cache) from error


def _quiet_libraries() -> None:
    """Switch off the model library's own progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@main.command()
@click.argument("cache", type=click.Path(exists=True, file_okay=False, path_type=Path))
def seal(cache: Path) -> None:
    """Write the manifest of a complete cache from its sidecars."""
    from common.manifest import seal as seal_cache

    manifest = seal_cache(cache)
    click.echo(f"Sealed {cache}: {manifest.totals['samples']} samples in {len(manifest.shards)} shards")


@main.command()
@click.argument("cache", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(cache: Path) -> None:
    """Print what a sealed cache holds and what it cost."""
    from common.manifest import read_manifest
    from stage1_teacher.extract import BuildSummary
    from stage1_teacher.report import summary_text

    manifest = read_manifest(cache)
    click.echo(summary_text(BuildSummary(cache=cache, built=0, samples=0, seconds=0.0, manifest=manifest)))


@main.command("demo-teacher")
@click.option("--data", type=click.Choice(["shapes", "easy-vqa"]), default="shapes", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--seed", type=int, default=0, show_default=True)
def demo_teacher(data: str, output: Path, seed: int) -> None:
    """Train a built-in teacher from nothing (minutes on 2 cores) and print its accuracy."""
    from stage1_teacher.demo_teacher import train_demo_teacher

    train_demo_teacher(data, output, seed=seed)
    click.echo(f"Teacher written to {output}")
    click.echo(f"Next: make teacher-cache TEACHER={output} CACHE=build/cache/{output.name}")

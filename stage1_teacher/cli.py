"""``teacher-cache``: build a cache, measure its fidelity, seal it, report on it, train a built-in teacher."""

import logging
import sys
from pathlib import Path
from typing import Any

import click

from common.errors import DistillError

# Imports that pull torch in are inside the commands, so that --help and usage errors are instant.


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Stage one: run the teacher once over a data set and keep what students need."""


@cli.command()
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="YAML file.")
@click.option(
    "--data", help="shapes, easy-vqa, or a path: LLaVA .json, messages .jsonl, datasets folder, tars."
)
@click.option("--images", help="Image folder of a .json or .jsonl; default: the file's own folder.")
@click.option("--teacher", help="Checkpoint directory; default: the built-in teacher of built-in data.")
@click.option("--cache", help="Folder to write.")
@click.option("--store", type=click.Choice(["zarr", "webdataset"]), help="Shard format.")
@click.option("--signals", help="Comma-separated: logits, answer_attention, visual_columns, visual_map.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first samples.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any other option; repeatable.")
@click.option("--overwrite", is_flag=True, help="Start again if the folder holds a cache with other options.")
def build(config: Path | None, overrides: tuple[str, ...], *, overwrite: bool, **options: Any) -> None:
    """Build a cache, or resume one; says so and ends when it is complete."""
    from common.config import load_config
    from stage1_teacher.config import BuildConfig

    if options["signals"] is not None:
        options["signals"] = f"[{options['signals']}]"
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    settings = load_config(BuildConfig, config, [*overrides, *given])

    from stage1_teacher.extract import extract
    from stage1_teacher.report import next_command, summary_text

    summary = extract(settings, overwrite=overwrite)
    click.echo(summary_text(summary))
    click.echo(next_command(summary, settings.data))


@cli.command()
@click.argument("cache", type=click.Path(exists=True, file_okay=False, path_type=Path))
def seal(cache: Path) -> None:
    """Write the manifest of a complete cache from its sidecars."""
    from common.manifest import seal as seal_cache

    manifest = seal_cache(cache)
    click.echo(f"Sealed {cache}: {manifest.totals['samples']} samples in {len(manifest.shards)} shards")


@cli.command()
@click.argument("cache", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(cache: Path) -> None:
    """Print what a sealed cache holds and what it cost."""
    from common.manifest import read_manifest, read_plan
    from stage1_teacher.extract import BuildSummary
    from stage1_teacher.report import next_command, summary_text

    manifest = read_manifest(cache)
    summary = BuildSummary(
        cache=cache, built=0, samples=0, seconds=0.0, failed=manifest.totals["failed"], manifest=manifest
    )
    click.echo(summary_text(summary))
    click.echo(next_command(summary, str(read_plan(cache).data.get("name"))))


@cli.command("demo-teacher")
@click.option("--data", type=click.Choice(["shapes", "easy-vqa"]), default="shapes", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--seed", type=int, default=0, show_default=True)
def demo_teacher(data: str, output: Path, seed: int) -> None:
    """Train a built-in teacher from nothing (minutes on 2 cores) and print its accuracy."""
    from stage1_teacher.demo_teacher import train_demo_teacher

    train_demo_teacher(data, output, seed=seed)
    click.echo(f"Teacher written to {output}")
    click.echo(f"Next: make teacher-cache TEACHER={output} CACHE=build/cache/{output.name}")


def main() -> None:
    """Entry point: errors of ours print without a traceback and exit with 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        cli(standalone_mode=True)
    except DistillError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

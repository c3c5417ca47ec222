"""``cachectl``: look into a cache, verify it, convert it. Needs no GPU, no teacher and no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Never

import click
from tqdm import tqdm

from common.command_line import SETTINGS, CommandGroup
from common.plan import STORE_NAMES, read_plan

_CACHE = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(cls=CommandGroup, context_settings=SETTINGS)
def main() -> None:
    """Look into a teacher cache, verify it, convert it."""


@main.command()
@click.argument("cache", type=_CACHE)
@click.argument("sample_id", required=False)
def inspect(cache: Path, sample_id: str | None) -> None:
    """Show what a cache holds, or the record of one sample with its answer as text."""
    from common.inspection import describe_cache, describe_record

    if sample_id is None:
        click.echo(describe_cache(cache))
        return
    from common.cache import open_cache

    click.echo(describe_record(open_cache(cache), sample_id))


@main.command()
@click.argument("cache", type=_CACHE)
@click.option("--deep", is_flag=True, help="Decode every record too.")
def verify(cache: Path, *, deep: bool) -> None:
    """Check every file of a cache; one line per damaged file and exit code 1 if there is any."""
    from common.sharing import verify as verify_cache

    with _progress("verify") as bar:
        damages = verify_cache(cache, deep=deep, on_shard=bar.update)
    for damage in damages:
        click.echo(f"damaged: {damage}")
    if damages:
        click.echo(f"error: {cache}: {len(damages)} damaged files", err=True)
        raise click.exceptions.Exit(1)
    plan = read_plan(cache)
    click.echo(f"ok: {cache}: {plan.shard_count} shards, every byte as its sidecar and manifest say")
    click.echo(f"Next: cachectl inspect {cache}")


@main.command()
@click.argument("source", type=_CACHE)
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--store", type=click.Choice(STORE_NAMES), required=True, help="Shard format of the new cache.")
def convert(source: Path, target: Path, store: str) -> None:
    """Write the same cache in the other store; converting back gives the same bytes."""
    from common.sharing import convert as convert_cache

    with _progress("convert", total=read_plan(source).shard_count) as bar:
        manifest = convert_cache(source, target, store, on_shard=bar.update)
    totals = manifest.totals
    click.echo(f"Converted {totals['samples']} samples into {target} ({store}, {totals['bytes']:,} bytes)")
    click.echo(f"Next: cachectl verify {target}")


def _progress(title: str, total: int | None = None) -> tqdm[Never]:
    return tqdm(desc=title, total=total, unit="shard", disable=None)  # silent unless a person watches


if __name__ == "__main__":
    main()

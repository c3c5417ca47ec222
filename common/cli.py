"""``cachectl``: look into a cache, verify it, repair it, convert it, copy it. Needs no GPU, no teacher and no torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

import click

from vlm_distill_cache.common.cache.plan import STORE_NAMES, built_with, read_plan
from vlm_distill_cache.common.cache.schema import ONE_PICTURE
from vlm_distill_cache.common.errors import ConfigError, SampleNotCachedError
from vlm_distill_cache.common.locations import nearest
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.terminal.command_line import (
    DRY_RUN,
    SETTINGS,
    CacheFolder,
    CacheLocation,
    CommandGroup,
    NewFolder,
    can_print,
    fail,
    quoted,
    say,
    start_logging,
    tell,
)
from vlm_distill_cache.common.terminal.general import JSON, answer, has_document
from vlm_distill_cache.common.terminal.progress import ProgressLines, progress
from vlm_distill_cache.common.terminal.result_files import PICTURE_MARK, ResultFile, marked

if TYPE_CHECKING:
    from tqdm import tqdm

    from vlm_distill_cache.common.cache.manifest import Manifest
    from vlm_distill_cache.common.cache.reader import TeacherCache


_JOBS = click.option(
    "--jobs", default=8, show_default=True, type=click.IntRange(1, 64), help="How much to copy at a time."
)
_CACHE = CacheFolder()
_LOOKED_AT = 20_000  # ids, for one that was meant


@click.group(cls=CommandGroup, context_settings=SETTINGS)
def main() -> None:
    """Look into a teacher cache, verify it, repair it, convert it, copy it."""
    start_logging(logging.WARNING)


class _Picture(ResultFile):
    """A picture to draw; with --shift a folder of them, which is looked at before the work begins, too."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path."""
        return Path(value) if ctx is not None and ctx.params.get("shift") else super().convert(value, param, ctx)


@main.command()
@click.argument("cache", type=CacheLocation())
@click.argument("sample_id", required=False)
@click.option(
    "--picture",
    type=_Picture(marked(PICTURE_MARK), ending=".png"),
    help="Draw where each word looked, or with --sinks their heat maps: OUT.png; with --shift the largest shifts: a folder.",
)
@click.option(
    "--image",
    "image",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="The sample's image, to draw over; of several pictures repeat it, in any order.",
)
@click.option("--failed", is_flag=True, help="List the samples that could not be used, with the reasons, one a line.")
@click.option(
    "--sinks", is_flag=True, help="Show which places attract the teacher's attention whatever the picture shows."
)
@click.option("--shift", is_flag=True, is_eager=True, help="Measure how the teacher's gaze shifts within its answers.")
@click.option(
    "--data",
    help="With --shift or a SAMPLE_ID's --picture: the data that the cache was built from, for kinds of questions and "
    "pictures.",
)
@click.option("--images", help="Folder that image paths of --data start from; default: the data's own folder.")
@JSON
def inspect(
    cache: str,
    sample_id: str | None,
    picture: Path | None,
    image: tuple[Path, ...],
    data: str | None,
    images: str | None,
    *,
    failed: bool,
    shift: bool,
    sinks: bool,
) -> None:
    """Show what a cache holds; or of one sample the answer, the teacher's likeliest tokens and where it looked."""
    if failed and sample_id is not None:
        raise click.UsageError("--failed lists all samples that failed; leave SAMPLE_ID out")
    if shift and (failed or sample_id is not None or image):
        raise click.UsageError("--shift measures a whole cache; leave SAMPLE_ID, --image and --failed out")
    if sinks and (failed or shift or sample_id is not None or image):
        raise click.UsageError("--sinks is about a whole cache; leave SAMPLE_ID, --image, --failed and --shift out")
    if not shift and (sample_id is None or picture is None) and (data is not None or images is not None):
        raise click.UsageError("--data and --images go with --shift, or with SAMPLE_ID and --picture")
    if image and data is not None:
        raise click.UsageError("--image and --data both give the pictures; leave one out")
    if images is not None and data is None:
        raise click.UsageError("--images needs --data")
    if shift:
        _show_shift(cache, picture, data, images)
        return
    if (picture is not None and sample_id is None and not sinks) or (image and picture is None):
        raise click.UsageError("--picture needs a SAMPLE_ID, --sinks or --shift, and --image needs --picture")
    if sinks:
        _show_sinks(cache, picture)
        return
    if sample_id is None:
        from vlm_distill_cache.common.remotes.mirror import local_folder
        from vlm_distill_cache.common.tools.inspect import cache_values, describe_cache, failed_lines

        folder = local_folder(cache)  # of an address: where its descriptions are
        if has_document():
            answer(cache=cache, **cache_values(folder, all_failed=failed))
        found = False
        for line in failed_lines(folder) if failed else [describe_cache(folder, location=cache)]:
            say(line)
            found = True
        if not found:
            tell("no sample failed")
        return
    from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
    from vlm_distill_cache.common.opening import open_cache
    from vlm_distill_cache.common.tools.picture import BLOCKS
    from vlm_distill_cache.common.tools.record_view import describe_record, picture_of, record_values, save_picture

    opened = open_cache(cache)
    if sample_id not in opened and sample_id not in opened.failed:
        raise SampleNotCachedError(
            f"{cache}: no sample {sample_id!r} among its {len(opened)}{nearest(sample_id, islice(opened, _LOOKED_AT))}"
        )
    if picture is not None:
        asks = _open_asked(opened, data, images)
        shown = None if asks is None else asks.pictures(sample_id, opened.plan.extra.get("frames"))
        if asks is not None and shown is None:
            raise ConfigError(
                f"--data {data}: it has no pictures of sample {sample_id!r}, or one cannot be read; give the data that the cache "
                "was built from, or their files with --image"
            )
        save_picture(picture_of(opened, sample_id, image, shown), picture)
        answer(sample=sample_id, picture=picture)
        say(f"Drew {picture}")
        return
    say(describe_record(opened, sample_id, unicode=can_print(BLOCKS)))
    if has_document():
        answer(cache=cache, **record_values(opened, sample_id))
    if (
        sample_id in opened
        and len(opened.read(sample_id, {"tiles"})["tiles"])
        and RowAttentionCodec.signal in opened.signals
    ):
        name = quoted(sample_id) if one_line(sample_id) == sample_id else "SAMPLE_ID"
        files = "--image FILE" if opened.plan.format_version == ONE_PICTURE else "--data DATA --images IMAGES"
        tell(f"\nNext: cachectl inspect {quoted(cache)} {name} --picture OUT.png [{files}]")


def _open_asked(opened: TeacherCache, data: str | None, images: str | None) -> Any:
    """The data that a cache was built from, if they were given; opened by the data package, which stands above."""
    opens: Callable[..., Any] | None = click.get_current_context().find_root().obj
    if data is not None and opens is None:
        raise click.UsageError("--data is known to the command cachectl only, not to this module alone")
    split = str(opened.plan.data.get("split") or "train")
    return None if data is None or opens is None else opens(data, split=split, images=images)


def _show_sinks(cache: str, picture: Path | None) -> None:
    from vlm_distill_cache.common.opening import open_cache
    from vlm_distill_cache.common.tools.picture import ASCII, BLOCKS
    from vlm_distill_cache.common.tools.record_view import save_picture
    from vlm_distill_cache.common.tools.sinks import describe_sinks, draw_sinks, read_sinks, sink_values

    opened = open_cache(cache)
    found = read_sinks(opened)
    if picture is not None:
        save_picture(draw_sinks(opened, found), picture)
    if has_document():
        answer(cache=cache, picture=picture, **sink_values(found))
    say(describe_sinks(opened, found, shades=BLOCKS if can_print(BLOCKS) else ASCII))
    if picture is not None:
        say(f"Drew {picture}")
    else:
        tell(f"\nNext: cachectl inspect {quoted(cache)} --sinks --picture OUT.png")


def _show_shift(cache: str, picture: Path | None, data: str | None, images: str | None) -> None:
    from vlm_distill_cache.common.opening import open_cache
    from vlm_distill_cache.common.tools.shift_view import draw_shifts, measure_cache, picture_folder, shift_lines

    folder = None if picture is None else picture_folder(picture)
    opened = open_cache(cache)
    asks = _open_asked(opened, data, images)
    report = measure_cache(opened, asks, name=str(data))
    drawn = [] if folder is None else draw_shifts(opened, report, asks, folder)
    answer(cache=cache, **report.values(), drawn=[path for path, _ in drawn])
    for line in shift_lines(report, cache):
        say(line)
    for path, over in drawn:
        say(f"Drew {path}" + ("" if over else " (maps alone)"))
    if drawn:
        say(
            "In a picture, the percentage beside a token is its attention on the picture; beside `kept` its gaze on the kept cells"
        )
    named = (
        "--data DATA" if data is None else f"--data {quoted(data)}" + (f" --images {quoted(images)}" if images else "")
    )
    if data is None or (not drawn and report.largest):
        tell(f"\nNext: cachectl inspect {quoted(cache)} --shift {named} --picture FOLDER")


@main.command()
@click.argument("cache", type=_CACHE)
@click.option("--deep", is_flag=True, help="Decode every record too.")
@JSON
def verify(cache: Path, *, deep: bool) -> None:
    """Check every file of a cache; one line per damaged file and exit code 1 if there is any."""
    from vlm_distill_cache.common.tools.verify import split_unfinished
    from vlm_distill_cache.common.tools.verify import verify as verify_cache

    with _progress("verify") as bar:
        unfinished, damages = split_unfinished(verify_cache(cache, deep=deep, on_shard=bar.update))
    answer(
        cache=cache,
        ok=not damages and not unfinished,
        damaged=[{**vars(damage), "remedy": damage.remedy} for damage in damages],
        missing=[damage.shard for damage in unfinished if damage.shard is not None],
    )
    for damage in damages:
        say(f"damaged: {damage}")
    if unfinished and not damages:
        from vlm_distill_cache.common.cache.manifest import format_ranges

        missing = [damage.shard for damage in unfinished if damage.shard is not None]
        what = f"{len(missing)} shards are missing ({format_ranges(missing)})" if missing else "it is not sealed"
        fail(f"{cache}: not finished: {what}; what is there is sound")
        tell(
            f"Next: {built_with(read_plan(cache))} with the same options makes the missing shards and seals the cache; of parts "
            "built in folders of their own: cachectl merge"
            if missing
            else f"Next: teacher-cache seal {quoted(cache)}"
        )
        raise click.exceptions.Exit(1)
    if damages:
        fail(f"{cache}: {len(damages)} damaged files")
        tell(f"Next: cachectl repair {quoted(cache)}{' --deep' if deep else ''} --dry-run")
        raise click.exceptions.Exit(1)
    plan = read_plan(cache)
    values = ", all values valid" if deep else ""
    say(f"ok: {cache}: {plan.shard_count} shard{'s' * (plan.shard_count != 1)}, all checksums match{values}")
    tell(f"Next: cachectl inspect {quoted(cache)}")


@main.command()
@click.argument("cache", type=_CACHE)
@click.option("--deep", is_flag=True, help="Decode every record too, and drop shards with wrong values.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@JSON
def repair(cache: Path, *, deep: bool, dry_run: bool) -> None:
    """Remove damaged shards, so that `teacher-cache build` with the same options makes exactly these anew.

    Healthy shards are not touched, and files that belong to no cache are named and left where they are. Exit
    code 1 if a problem needs your attention.
    """
    from vlm_distill_cache.common.cache.sidecar import missing_shards
    from vlm_distill_cache.common.tools.repair import repair as repair_cache

    with _progress("verify") as bar:
        steps = repair_cache(cache, deep=deep, dry_run=dry_run, on_shard=bar.update)
    answer(cache=cache, dry_run=dry_run, steps=steps)
    for step in steps:
        say(f"would {step}" if dry_run and step.action != "keep" else str(step))
    if not steps:
        plan = read_plan(cache)
        missing = len(missing_shards(cache, plan))
        more = f"; {missing} of {plan.shard_count} shards are to be built" if missing else ""
        say(f"ok: {cache}: nothing to repair{more}")
        return
    kept = sum(step.action == "keep" for step in steps)
    if dry_run and kept < len(steps):
        tell(f"Next: cachectl repair {quoted(cache)}{' --deep' if deep else ''}")
    elif any(step.action == "remove" for step in steps):
        plan = read_plan(cache)
        missing = len(missing_shards(cache, plan))
        tell(f"Next: {built_with(plan)} with the same options makes the missing shards ({missing}) and seals the cache")
    if kept:
        fail(f"{cache}: {kept} problems need your attention")
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("source", type=_CACHE)
@click.argument("target", type=NewFolder())
@click.option("--store", type=click.Choice(STORE_NAMES), required=True, help="Shard format of the new cache.")
@DRY_RUN
@JSON
def convert(source: Path, target: Path, store: str, *, dry_run: bool) -> None:
    """Write the same cache in the other store; converting back gives the same bytes."""
    if dry_run:
        from vlm_distill_cache.common.tools.previews import preview_convert

        preview_convert(source, target, store=store).show()
        return
    from vlm_distill_cache.common.tools.convert import convert as convert_cache

    with _progress("convert", total=read_plan(source).shard_count) as bar:
        manifest = convert_cache(source, target, store, on_shard=bar.update)
    totals = manifest.totals
    answer(cache=target, store=store, totals=totals)
    say(f"Converted {totals['samples']} samples into {target} ({store}, {totals['bytes']:,} bytes)")
    tell(f"Next: cachectl verify {quoted(target)}, then {_distill(target, manifest)}")


@main.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=_CACHE)
@click.option("--output", required=True, type=NewFolder(), help="Folder of the new cache.")
@click.option("--store", type=click.Choice(STORE_NAMES), help="Shard format; default: the first source's.")
@DRY_RUN
@JSON
def merge(sources: tuple[Path, ...], output: Path, store: str | None, *, dry_run: bool) -> None:
    """Merge caches of one teacher and codec, or the parts of one plan built on several machines.

    Samples in several sources must be equal in all of them and are kept once. Caches that differ in a
    fingerprint are refused.
    """
    if dry_run:
        from vlm_distill_cache.common.tools.previews import preview_merge

        preview_merge(sources, output, store=store).show()
        return
    from vlm_distill_cache.common.cache.manifest import format_ranges
    from vlm_distill_cache.common.cache.side_files import CARD
    from vlm_distill_cache.common.tools.merge import merge as merge_caches

    with _progress("merge") as bar:
        merged = merge_caches(sources, output, store=store, on_shard=bar.update)
    repeated = f", {merged.repeated} of them in several sources" if merged.repeated else ""
    totals = None if merged.manifest is None else merged.manifest.totals
    answer(cache=output, samples=merged.samples, repeated=merged.repeated, missing=merged.missing, totals=totals)
    say(f"Merged {merged.samples} samples into {output}{repeated}")
    if merged.manifest is None:
        say(f"Not sealed: {len(merged.missing)} shards are missing: {format_ranges(merged.missing)}")
        tell(f"Next: cachectl merge {quoted(output)} MORE_PARTS --output ANOTHER_FOLDER, or teacher-cache build")
        return
    if not (output / CARD).is_file():
        tell(
            f"Next: teacher-cache fidelity --cache {quoted(output)} with the build's options: measures it, writes its card"
        )
        return
    tell(f"Next: cachectl verify {quoted(output)}, then {_distill(output, merged.manifest)}")


@main.command()
@click.argument("cache", type=_CACHE)
@click.argument("destination")
@_JOBS
@click.option("--overwrite", is_flag=True, help="Replace another cache that is there.")
@DRY_RUN
@JSON
def push(cache: Path, destination: str, *, jobs: int, overwrite: bool, dry_run: bool) -> None:
    """Copy a finished cache to a folder, s3://BUCKET/PREFIX or hf://datasets/ORG/NAME[@REVISION][/FOLDER].

    If stopped, run it again to continue. The destination never holds a partial cache that looks complete.
    """
    if dry_run:
        from vlm_distill_cache.common.tools.previews import preview_push

        preview_push(cache, destination, jobs=jobs, overwrite=overwrite).show()
        return
    from vlm_distill_cache.common.remotes.push import push as push_cache

    with _byte_progress("push") as bar:
        _, moved = push_cache(cache, destination, jobs=jobs, overwrite=overwrite, on_progress=_follow(bar))
    answer(cache=cache, destination=destination, transferred=moved)
    say(f"Pushed {cache} to {destination}: {moved}")
    tell(f"Next, elsewhere: cachectl pull {quoted(destination)} {quoted(cache.name)}")


@main.command()
@click.argument("source")
@click.argument("cache", type=NewFolder())
@_JOBS
@click.option("--shards", metavar="0-3,7", help="Only these shards.")
@click.option("--samples", metavar="N|FILE", help="Only the first N records, or the ids in a file, one a line.")
@click.option("--signals", metavar="A,B", help="Only these signals.")
@click.option("--top-k", type=click.IntRange(min=2), help="At most so many tokens a row of the logits.")
@click.option("--no-verify", is_flag=True, help="Do not look through the records for what no teacher can have said.")
@DRY_RUN
@JSON
def pull(
    source: str,
    cache: Path,
    *,
    jobs: int,
    shards: str | None,
    samples: str | None,
    signals: str | None,
    top_k: int | None,
    no_verify: bool,
    dry_run: bool,
) -> None:
    """Copy a cache here, byte for byte, from a folder, s3://, hf://datasets/... or http(s)://.

    Every file is checked against its size and both digests, and every record is looked through for what no teacher can
    have said. If stopped, run it again to continue; run on a finished copy, it replaces what is lost or damaged there.
    --shards, --samples, --signals and --top-k download only what is needed and create a smaller cache that records its
    source.
    """
    wanted: dict[str, Any] = {"shards": shards, "samples": samples, "signals": signals, "top_k": top_k}
    part = any(value is not None for value in wanted.values())
    if dry_run:
        from vlm_distill_cache.common.tools.previews import preview_pull

        preview_pull(source, cache, part=wanted if part else None).show()
        return
    from vlm_distill_cache.common.tools.trust import demand_sound

    if part:
        from vlm_distill_cache.common.tools.select import parse_selection, pull_partial

        selection = parse_selection(**wanted)
        with _progress("pull") as shard_bar:
            smaller = pull_partial(source, cache, selection, jobs=jobs, on_shard=shard_bar.update)
        if not no_verify:
            demand_sound(cache, read_plan(cache), smaller)
        answer(cache=cache, source=source, totals=smaller.totals)
        say(f"Pulled {smaller.totals['samples']} samples of {source} to {cache} ({smaller.totals['bytes']:,} bytes)")
        tell(f"Next: cachectl inspect {quoted(cache)}, then {_distill(cache, smaller)}")
        return
    from vlm_distill_cache.common.remotes.pull import pull as pull_cache

    with _byte_progress("pull") as bar:
        manifest, moved = pull_cache(source, cache, jobs=jobs, on_progress=_follow(bar))
    if not no_verify:
        demand_sound(cache, read_plan(cache), manifest)
    answer(cache=cache, source=source, totals=manifest.totals, transferred=moved)
    say(f"Pulled {source} to {cache}: {moved}")
    tell(f"Next: {_distill(cache, manifest)}")


def _distill(cache: Path, manifest: Manifest) -> str:
    from vlm_distill_cache.common.terminal.next_step import distill_command

    return distill_command(read_plan(cache), cache, pictures=manifest.totals.get("pictures"))


def _progress(title: str, total: int | None = None) -> tqdm[Never] | ProgressLines:
    return progress(title, total=total, unit="shard", keep=False)


def _byte_progress(title: str) -> tqdm[Never] | ProgressLines:
    return progress(title, unit="B", unit_scale=True, keep=False)


def _follow(bar: tqdm[Never] | ProgressLines) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


if __name__ == "__main__":
    main()

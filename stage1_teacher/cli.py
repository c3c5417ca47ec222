"""``teacher-cache``: build a cache, measure its fidelity, seal it, report on it, train a built-in teacher."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlm_distill_cache.common.cache.plan import STORE_NAMES, read_plan
from vlm_distill_cache.common.config import (
    canonical_overrides,
    canonical_values,
    load_options,
    read_stage,
    save_replay,
)
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.recipes import Recipe, merge_options, recipe_summary, split_recipe
from vlm_distill_cache.common.terminal.command_line import (
    CONFIG,
    DRY_RUN,
    FILE,
    PARENT,
    SETTINGS,
    CacheFolder,
    CommandGroup,
    NewFolder,
    end_with_parent,
    join_launch,
    quiet_libraries,
    say,
    shared_options,
    start_logging,
    stopped_by_sigterm,
    tell,
)
from vlm_distill_cache.common.terminal.engines.options import ENGINE_OPTIONS
from vlm_distill_cache.common.terminal.general import JSON, answer, complete_folder, completes, overrides
from vlm_distill_cache.common.terminal.launch import enter_launch
from vlm_distill_cache.common.terminal.result_files import (
    Finite,
    figures_file,
    json_of,
    marked,
    refuse_others_file,
)
from vlm_distill_cache.common.terminal.sharding import refuse_sharding
from vlm_distill_cache.stage1_teacher.demo.cli import demo_teacher
from vlm_distill_cache.stage1_teacher.imports.cli import build_config
from vlm_distill_cache.stage1_teacher.planning.folder_cli import seal, status

if TYPE_CHECKING:
    from vlm_distill_cache.common.tools.outlook import Outlook
    from vlm_distill_cache.stage1_teacher.config import BuildConfig

logger = logging.getLogger(__name__)
# Imports that pull torch or numpy in are inside the commands, so that --help and usage errors are instant.


@click.group(cls=CommandGroup, context_settings=SETTINGS)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Stage one: run the teacher once over a data set and keep what students need."""
    start_logging()
    join_launch(ctx, several=("build",))


def _signals() -> list[str]:
    from vlm_distill_cache.stage1_teacher.config import SIGNALS

    return list(SIGNALS)


class _Signals(click.Option):
    """Names the signals in its help; they are the codecs', which are imported when it is shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The option and its help."""
        self.help = f"Some of: {', '.join(_signals())}."
        return super().get_help_record(ctx)


_inputs = shared_options(
    CONFIG,
    click.option(
        "--data",
        shell_complete=completes(lambda: ["shapes", "easy-vqa", "photo-scenes"]),
        help="shapes, easy-vqa, photo-scenes, a path (JSON, CSV, parquet, a folder, tars), a data set of the hub, or a mixture "
        "(.yaml).",
    ),
    click.option(
        "--images",
        shell_complete=complete_folder,
        help="Folder that image paths start from; default: the data's own folder.",
    ),
    click.option(
        "--teacher",
        shell_complete=complete_folder,
        help="A folder or a name on the hub (org/name[@revision]); default: the built-in teacher of built-in data.",
    ),
)
_settings_options = shared_options(
    click.option("--store", type=click.Choice(STORE_NAMES), help="Shard format."),
    click.option(
        "--answers",
        type=click.Choice(["data", "generate"]),
        help="Score the data set's answers, or let the teacher write them.",
    ),
    click.option(
        "--signals",
        cls=_Signals,
        shell_complete=completes(_signals, several=True),
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Use only the first samples."),
    overrides(build_config),
)
_NPROC = click.option(
    "--nproc",
    type=click.IntRange(min=1, max=256),
    help="Processes on this machine, each on a GPU of its own where there are several.",
)
_build_options = shared_options(
    _inputs, click.option("--cache", shell_complete=complete_folder, help="Folder of the cache."), _settings_options
)


def _settings(options: dict[str, Any]) -> tuple[BuildConfig, Recipe | None]:
    """The configuration that the options shared by several commands give, and the recipe it began with."""
    return _resolve(*_file_and_options(options))


def _file_and_options(options: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """The YAML file, and all other options as ``a.b=c``."""
    config, settings, signals = (options.pop(name) for name in ("config", "overrides", "signals"))
    given = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    if signals is not None:
        given.append(f"signals=[{', '.join(signals.replace(',', ' ').split())}]")
    return config, [*settings, *given]


def _resolve(config: Path | None, given: Sequence[str]) -> tuple[BuildConfig, Recipe | None]:
    recipe, values, settings = split_recipe(read_stage(config, "teacher_cache"), given)
    where = "options" if config is None else str(config)
    values = canonical_values(build_config(), values, where=where)
    if recipe is not None:
        values = merge_options(recipe.stage_one, values)
    return load_options(build_config(), values, settings, where=where), recipe


def _looked_at(outlook: Outlook, options: dict[str, Any]) -> BuildConfig:
    """For a dry run: the configuration of the options that can be used; those that cannot are problems.

    Raises:
        click.exceptions.Exit: If nothing can be made of them, which is shown.
    """
    from vlm_distill_cache.common.tools.outlook import resolve_each

    settings, _ = resolve_each(outlook, lambda *some: _resolve(*some)[0], *_file_and_options(options))
    if settings is None:
        outlook.show()
        raise click.exceptions.Exit(1)
    return settings


def _given(options: dict[str, Any]) -> set[str]:
    """Names of the options that were given, whatever the words, before `_settings` takes them."""
    config = build_config()
    recipe, values, settings = split_recipe(read_stage(options["config"], "teacher_cache"), options["overrides"])
    named = {text.partition("=")[0].strip() for text in canonical_overrides(config, settings)}
    named |= {name for name, value in options.items() if value is not None}
    named |= canonical_values(config, values, where="options").keys()
    return (named | (recipe.stage_one.keys() if recipe else set())) & config.__dataclass_fields__.keys()


@main.command()
@_build_options
@_NPROC
@click.option(
    "--part",
    metavar="R/N|any",
    help="Build shards R of N (counted from 0), on any machine: all parts in one shared folder (the last one seals "
    "it), or each in its own, joined by `cachectl merge`. With `any`: the next free shard, again and again, beside any "
    "number of such workers on one shared folder; so do the processes of torchrun, srun or mpirun by default.",
)
@click.option("--overwrite", is_flag=True, help="Start again, whatever cache the folder holds.")
@DRY_RUN
@click.option(
    "--sketch",
    type=NewFolder(),
    help="With --dry-run: write what the cache will say of itself, without shards, to this new folder; `distill run --dry-run "
    "--sketch` then checks a student against it.",
)
@click.option(
    "--estimate", type=FILE, help="With --dry-run: what `teacher-cache estimate --json` wrote, for bytes and hours."
)
@JSON
def build(
    *,
    nproc: int | None,
    part: str | None,
    overwrite: bool,
    dry_run: bool,
    sketch: Path | None,
    estimate: Path | None,
    **options: Any,
) -> None:
    """Build a cache or resume one; does nothing if it is complete."""
    if not dry_run and (sketch or estimate) is not None:
        raise click.UsageError("--sketch and --estimate go with --dry-run")
    if PARENT in os.environ:
        end_with_parent()
    refuse_sharding(enter_launch().sharding, model="teacher")

    from vlm_distill_cache.common.recipes.cache_fit import cache_differences, differences_text
    from vlm_distill_cache.common.terminal.next_step import IN_RUN
    from vlm_distill_cache.common.tools.outlook import Outlook

    outlook, recipe = Outlook(), None
    if dry_run:  # before what takes seconds
        logger.info("looking at teacher, data and cache; nothing is built")
        settings = _looked_at(outlook, options)
    else:
        settings, recipe = _settings(options)

    from vlm_distill_cache.stage1_teacher.extract import extract, extract_with_processes
    from vlm_distill_cache.stage1_teacher.planning.cache_folder import explain_disk_errors
    from vlm_distill_cache.stage1_teacher.planning.extension import stated
    from vlm_distill_cache.stage1_teacher.planning.parts import choose_part, choose_ranks, local_device
    from vlm_distill_cache.stage1_teacher.report import next_command, summary_text, summary_values
    from vlm_distill_cache.stage1_teacher.teacher.follow import leads_ranks

    ranks, asked = choose_ranks(settings, nproc, enter_launch(), overwrite=overwrite), settings
    own, local = choose_part(part, enter_launch().of_groups(ranks))
    if overwrite and not own.is_whole:
        raise click.UsageError(
            f"--overwrite with part {own}: several processes would delete each other's shards. Run "
            "`teacher-cache build --overwrite` without --part, in one process, or delete the folder, then start the parts."
        )
    if nproc is not None and nproc > 1 and settings.device_map:
        raise click.UsageError(
            f"--nproc {nproc} with device_map={settings.device_map}: each process would spread the teacher over the "
            "same devices. Leave one of the two out."
        )
    quiet_libraries()
    if dry_run:
        from vlm_distill_cache.stage1_teacher.planning.preview import preview_build

        preview_build(
            outlook, settings, overwrite=overwrite, part=own, processes=nproc or 1, sketch=sketch, estimate=estimate
        ).show()
        return
    with explain_disk_errors(settings.cache), stopped_by_sigterm():
        if nproc is None:
            settings = replace(settings, device=local_device(settings.device, local))
            if not leads_ranks(enter_launch(), ranks, settings.device):
                return  # its leader is done
            summary = extract(settings, overwrite=overwrite, part=own)
        else:
            summary = extract_with_processes(settings, nproc, overwrite=overwrite, part=own)
    replay = save_replay(
        replace(asked, **stated(read_plan(summary.cache))), asked.cache
    )  # what it was begun with stays
    answer(**summary_values(summary), options=replay)
    say(summary_text(summary))
    if replay is not None:
        tell(f"Options: {replay}")
    proposed = ""
    if recipe is not None:
        say(recipe_summary(recipe, "stage_one", settings))
        others = [found for found in cache_differences(recipe, read_plan(summary.cache)) if found.signals]
        if others:
            say(
                f"  so this is no cache for {by_make('SET=', '--set ')}recipe={recipe.name} (stage two): {differences_text(others)}"
            )
        elif not recipe.students:  # the command that is proposed trains another one
            proposed = recipe.name
    if summary.manifest is not None and IN_RUN not in os.environ:
        tell(next_command(summary, settings, recipe=proposed))


@main.command()
@_build_options
@_NPROC
@ENGINE_OPTIONS
@click.option("--workers", type=click.IntRange(min=1, max=4096), default=1, show_default=True, help="How many.")
@DRY_RUN
@JSON
def submit(*, nproc: int | None, workers: int, dry_run: bool, **options: Any) -> None:
    """Have Ray or SLURM start workers of `build --part any`, on machines that share the cache's folder.

    The same command adds workers at any time. --nproc is of each worker; default: a process for each of its --gpus, or one
    with device_map.
    """
    from vlm_distill_cache.common.terminal.engines.command import start_workers, take_engine

    engine, (settings, _) = take_engine(options), _settings(dict(options))
    count = nproc or (1 if settings.device_map else max(1, engine.gpus))
    started = start_workers(
        engine,
        ["vlm_distill_cache.stage1_teacher.cli", "build"],
        options=_file_and_options(options),
        behind=["--part", "any", *(["--nproc", str(count)] if count > 1 else [])],
        place=settings.cache,
        name="teacher-cache",
        job={"workers": workers, "processes": count},
        dry_run=dry_run,
    )
    answer(**started)


@main.command()
@click.argument("cache", type=CacheFolder())
@_inputs
@_settings_options
@_NPROC
@DRY_RUN
@JSON
def extend(*, cache: Path, nproc: int | None, dry_run: bool, **options: Any) -> None:
    """Add signals, finer settings, new or formerly failed samples to a finished cache.

    Takes the options of `build`: data and teacher as they were, and what is wanted beside what is there. Signals are added;
    of other options, the cache's own stay where none are given. The teacher runs for what is missing alone, and the cache is
    as it was until the new one is finished.
    """
    from vlm_distill_cache.common.tools.outlook import Outlook

    given = _given(options)
    outlook = Outlook()
    settings = _looked_at(outlook, options) if dry_run else _settings(options)[0]
    if "cache" in given and Path(settings.cache).resolve() != cache.resolve():
        raise click.UsageError(f"cache={settings.cache} beside {cache}: leave one of the two out")

    from vlm_distill_cache.stage1_teacher.extend import extend as extend_cache
    from vlm_distill_cache.stage1_teacher.planning.cache_folder import explain_disk_errors
    from vlm_distill_cache.stage1_teacher.report import extension_text, extension_values, next_command

    quiet_libraries()
    if dry_run:
        from vlm_distill_cache.stage1_teacher.planning.preview import preview_extension

        preview_extension(outlook, replace(settings, cache=str(cache)), given=given, processes=nproc or 1).show()
        return
    with explain_disk_errors(cache), stopped_by_sigterm():
        extension = extend_cache(replace(settings, cache=str(cache)), given=given, processes=nproc)
    replay = save_replay(extension.options, cache)
    answer(**extension_values(extension), options=replay)
    say(extension_text(extension))
    if replay is not None and extension.before is not None:
        tell(f"Options: {replay}")
    if extension.summary is not None and extension.before is not None:
        tell(next_command(extension.summary, extension.options or settings))


@main.command()
@_build_options
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True, help="Size of the probe.")
@JSON
def fidelity(*, samples: int, **options: Any) -> None:
    """Compare a finished cache with its live teacher again; takes the options it was built with."""
    settings, _ = _settings(options)

    from vlm_distill_cache.stage1_teacher.extract import recompute_fidelity
    from vlm_distill_cache.stage1_teacher.planning.cache_folder import explain_disk_errors

    quiet_libraries()
    with explain_disk_errors(settings.cache):
        measured = recompute_fidelity(settings, samples=samples).fidelity or {}
    answer(cache=settings.cache, fidelity=measured)
    for name, value in measured.items():
        say(f"  {name:<44}{value:>14}")


ESTIMATE = json_of("assumptions", "comparison", "probe")
ADVICE = {"advice.json": json_of("sets", "recommendation"), "advice.html": marked(b"<title>Advice for ")}


_POSITIVE = Finite(min=0, min_open=True)


@main.command()
@_build_options
@click.option(
    "--samples", type=click.IntRange(min=1), default=32, show_default=True, help="Size of the measured probe."
)
@click.option(
    "--students", default="1,3,10", show_default=True, help="Numbers of students to compare, comma-separated."
)
@click.option("--epochs", type=_POSITIVE, default=1.0, show_default=True, help="Passes of each student over the data.")
@click.option(
    "--student-parameters",
    type=_POSITIVE,
    help="Parameters of a student, for example 1.4e9; default: a fifth of the teacher's.",
)
@click.option("--student-step", type=_POSITIVE, help="Seconds of training a sample, if you measured a student.")
@click.option("--price", type=Finite(min=0), help="Of the teacher's machine for an hour; adds costs to the hours.")
@figures_file(ESTIMATE)
def estimate(
    *,
    samples: int,
    students: str,
    epochs: float,
    student_parameters: float | None,
    student_step: float | None,
    price: float | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Predict bytes, hours and cost from a measured probe, before anything is built; takes the options of `build`."""
    settings, _ = _settings(options)

    from vlm_distill_cache.common.files.atomic import write_json_atomic
    from vlm_distill_cache.stage1_teacher.estimate.estimate import Scenario, estimate_text, parse_students
    from vlm_distill_cache.stage1_teacher.estimate.estimate import estimate as measure

    try:
        counts = parse_students(students)
    except ValueError as error:
        raise click.BadParameter(f"{students!r}: expected numbers like 1,3,10 ({error})") from error
    quiet_libraries()
    scenario = Scenario(
        students=counts, epochs=epochs, student_parameters=student_parameters, student_step=student_step, price=price
    )
    figures = measure(settings, scenario, samples=samples)
    say(estimate_text(figures))
    answer(**figures.to_dict())
    if json_file:
        write_json_atomic(json_file, figures.to_dict())


@main.command()
@_build_options
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Size of the probe, spread over the data.",
)
@click.option("--budget", help="Recommend what fits this size, such as 20GB.")
@click.option(
    "--max-gradient-error",
    type=_POSITIVE,
    help="Recommend the smallest cache within this bound; default without a budget: 0.05.",
)
@click.option(
    "--output",
    type=NewFolder(file_okay=False),
    help="Folder for advice.html and advice.json; default: nothing is written.",
)
@figures_file(ADVICE["advice.json"])
@click.option("--student", help="Also train a short student on each preset, and score it (minutes each).")
@click.option(
    "--student-steps", type=click.IntRange(min=1), default=100, show_default=True, help="Steps of a short student."
)
@click.option(
    "--student-set", multiple=True, metavar="KEY=VALUE", help="Option of `distill train` for them; repeatable."
)
@click.option("--eval-data", help="Held-out items that they are scored on; default: those of the data.")
def advise(
    *,
    samples: int,
    budget: str | None,
    max_gradient_error: float | None,
    output: Path | None,
    json_file: Path | None,
    student: str | None,
    student_steps: int,
    student_set: tuple[str, ...],
    eval_data: str | None,
    **options: Any,
) -> None:
    """Compare presets, top-k and bits by bytes and gradient error on a probe, and say which to build with."""
    given = {name: value for name, value in options.items() if name != "overrides"}
    options_given, named = canonical_overrides(build_config(), options["overrides"]), _given(options)
    settings, _ = _settings(options)

    import gc
    from tempfile import TemporaryDirectory

    from vlm_distill_cache.common.files.atomic import write_bytes_atomic, write_json_atomic
    from vlm_distill_cache.common.files.disk import name_full_disk, parse_bytes
    from vlm_distill_cache.data.sources.mixture import own_caches
    from vlm_distill_cache.stage1_teacher.estimate import advise_report as report
    from vlm_distill_cache.stage1_teacher.estimate.advise import advise as weigh
    from vlm_distill_cache.stage1_teacher.estimate.advise import measure_options
    from vlm_distill_cache.stage1_teacher.estimate.short_students import (
        refuse_student,
        score_lines,
        score_students,
    )

    most = None if budget is None else parse_bytes(budget, "budget")
    bound = 0.05 if most is None and max_gradient_error is None else max_gradient_error
    if "data" in named and "cache" not in named:  # the cache of other data has the default's place
        given["cache"] = report.cache_for(settings.data, settings.store)
    quiet_libraries()
    short: Any = {"student": student, "steps": student_steps, "eval_data": eval_data, "overrides": student_set}
    places = {}
    if output is not None:
        places = {
            name: refuse_others_file(output / name, is_ours) if output.is_dir() else output / name
            for name, is_ours in ADVICE.items()
        }
        output.mkdir(parents=True, exist_ok=True)
    with (
        stopped_by_sigterm(),
        TemporaryDirectory(dir=output, prefix=".advise-") as scratch,
        name_full_disk(Path(scratch)),
    ):
        if student is not None:
            refuse_student(settings, Path(scratch), **short)
        kept = Path(scratch) / "probe"
        kept.mkdir()
        measured = measure_options(settings, kept, samples=samples)
        advice = weigh(measured)
        found = advice.recommend(budget=most, bound=bound)
        place = str(given["cache"] or settings.cache)
        taken = ""
        if own_caches(settings.data, place) is None and measured.is_taken(Path(place), found.options):
            taken, given["cache"] = place, report.free_place(place)
        command = report.build_command(given, options_given, found.options)
        scores = None
        if student is not None:
            gc.collect()  # the teacher, whose memory students need
            scores = score_students(measured, Path(scratch), **short, chosen=found.options)
    table = report.advice_text(advice, None if scores is None else score_lines(scores))
    last = report.recommendation_text(
        found, command, budget=most, bound=bound, advice=advice, tolerated=settings.max_failed_share, taken=taken
    )
    say(f"{table}\n\n{last}")
    figures = report.advice_json(advice, found, command, scores)
    answer(**figures)
    if json_file:
        write_json_atomic(json_file, figures)
    if output is not None:
        write_json_atomic(places["advice.json"], figures)
        write_bytes_atomic(places["advice.html"], report.advice_page(advice, f"{table}\n\n{last}").encode())
        say(f"Plot: {output / 'advice.html'}")


@main.command()
@click.argument("cache", type=CacheFolder())
@JSON
def report(cache: Path) -> None:
    """Print what a sealed cache holds and what it cost."""
    from vlm_distill_cache.common.cache.manifest import read_manifest
    from vlm_distill_cache.stage1_teacher.extract import BuildSummary, refuse_missing_shards
    from vlm_distill_cache.stage1_teacher.report import summary_text, summary_values

    refuse_missing_shards(cache)
    summary = BuildSummary(cache=cache, manifest=read_manifest(cache))
    answer(**summary_values(summary))
    say(summary_text(summary))


for command in (seal, status, demo_teacher):
    main.add_command(command)


if __name__ == "__main__":
    main()

"""``distill``: train students from a teacher cache, score them, report on them, export them."""

import json
import logging
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click

from vlm_distill_cache.common.config import config_from_dict, last_given, read_stage, read_yaml
from vlm_distill_cache.common.errors import ConfigError, LaunchError
from vlm_distill_cache.common.files.atomic import write_json_atomic
from vlm_distill_cache.common.files.disk import parse_bytes
from vlm_distill_cache.common.hub import hub_name, model_folder
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.recipes import recipe_summary, split_recipe
from vlm_distill_cache.common.terminal.command_line import (
    FOLDER,
    SETTINGS,
    CacheLocation,
    CommandGroup,
    NewFolder,
    end_with_parent,
    join_launch,
    quoted,
    say,
    show_failure,
    start_logging,
    stopped_by_sigterm,
    tell,
)
from vlm_distill_cache.common.terminal.engines.options import ENGINE_OPTIONS
from vlm_distill_cache.common.terminal.general import JSON, answer, complete_folder
from vlm_distill_cache.common.terminal.launch import enter_launch, explain_lost_processes
from vlm_distill_cache.common.terminal.result_files import Finite, ResultFile, figures_file, json_of
from vlm_distill_cache.common.terminal.sharding import refuse_sharding
from vlm_distill_cache.common.tools.both_stages import build_first
from vlm_distill_cache.common.tools.outlook import Outlook
from vlm_distill_cache.stage2_student import run as runs
from vlm_distill_cache.stage2_student.config import PHASE_NAMES, TRACKERS, Split, TrainConfig
from vlm_distill_cache.stage2_student.final_folder import FINAL, FOR_OTHERS, PROVENANCE, read_provenance, trained_folder
from vlm_distill_cache.stage2_student.prune.options import pruning_options
from vlm_distill_cache.stage2_student.prune.tokens_cli import select_tokens
from vlm_distill_cache.stage2_student.pruned_folder import Kept, PruningConfig, refuse_uncut
from vlm_distill_cache.stage2_student.scores.on_the_way import best_on_the_way, read_evaluations
from vlm_distill_cache.stage2_student.scores.quantised import (
    QUANTISATIONS,
    WRITTEN,
    Quantisation,
    quantise_option,
    quantised_lines,
    quantised_values,
    reports_of,
)
from vlm_distill_cache.stage2_student.scores.results import read_scores, render_table
from vlm_distill_cache.stage2_student.scores.token_words import token_words
from vlm_distill_cache.stage2_student.suite.cli import suite
from vlm_distill_cache.stage2_student.suite.compare import compare
from vlm_distill_cache.stage2_student.training.options import IMAGES, estimated_options, training_options
from vlm_distill_cache.stage2_student.training.output_folder import refuse_foreign_folder
from vlm_distill_cache.stage2_student.training.recipe_caches import cache_lines
from vlm_distill_cache.stage2_student.training.resolve import given_options, open_caches
from vlm_distill_cache.stage2_student.training.stamp import COMPARED
from vlm_distill_cache.stage2_student.training.submit import TRAINING_JOB, submit_training

_NO_TRACKER = ("none", "no", "off", "false", "null")  # as YAML has it
ESTIMATE = json_of("phases", "choices", "assumptions")
_log = logging.getLogger(__name__)
# Imports that pull torch in are inside the commands, so that --help, usage errors and "up to date" are instant.


@click.group(cls=CommandGroup, context_settings=SETTINGS)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Stage two: train students from a teacher cache, without the teacher."""
    start_logging()
    threading.excepthook = _say_in_a_line
    join_launch(ctx, several=("train", "run"))


def _say_in_a_line(failed: threading.ExceptHookArgs) -> None:
    """A thread that cannot write (TensorBoard's, on a full disk) says so without a traceback; a step fails of it too."""
    if issubclass(failed.exc_type, OSError):
        logging.getLogger(__name__).warning("not written: %s", failed.exc_value)
    else:
        show_failure(failed.exc_type, failed.exc_value, failed.exc_traceback)


def _given(options: dict[str, Any]) -> tuple[Path | None, list[str], str]:
    """The YAML file, all other options as ``a.b=c``, and the cache."""
    config, settings, cache, phases, seed, report_to = (
        options.pop(name) for name in ("config", "overrides", "cache", "phases", "seed", "report_to")
    )
    given = [f"{name}={json.dumps(str(value))}" for name, value in options.items() if value is not None]
    given += [f"{name}={value}" for name, value in (("seed", seed), ("report_to", report_to)) if value is not None]
    if phases:
        names = phases.replace(",", " ").split()
        if unknown := [name for name in names if name not in PHASE_NAMES]:
            raise ConfigError(f"phases: {unknown[0]!r} is none of {', '.join(PHASE_NAMES)}")
        given.append(f"phases=[{', '.join(names)}]")
    if unknown := sorted(set(re.findall(r"[^\s,'\"\[\]]+", (report_to or "").lower())) - {*TRACKERS, *_NO_TRACKER}):
        raise ConfigError(f"--log-with (report_to): {unknown[0]!r} is none of {', '.join(TRACKERS)}, none")
    given += settings
    cache = cache or last_given(given_options(config, given)[1], "cache")
    if not cache:
        raise ConfigError("cache: none is given; add --cache FOLDER, or cache: FOLDER to the file of --config")
    return config, given, cache


def _load(options: dict[str, Any]) -> tuple[TrainConfig, str]:
    """The configuration that the options shared by several commands give, and what of it is a recipe's."""
    config, given, cache = _given(options)
    resolved = runs.load_run_config(config, given, cache=cache)
    recipe, _, _ = split_recipe(read_stage(config, "distill"), given)
    if recipe is None:
        return resolved, ""
    return resolved, "\n".join([recipe_summary(recipe, "stage_two", resolved), *cache_lines(resolved, recipe)])


def _preview(
    options: Mapping[str, Any], look_at_folder: Any, sketch: Path | None, *, trainings: Sequence[str], processes: int
) -> Outlook:
    """What ``--dry-run`` says."""
    _log.info("looking at cache, data and student; nothing is trained")
    from vlm_distill_cache.stage2_student.training.preview import preview

    config, given, cache = _given(dict(options))
    runs.set_up_libraries()
    return preview(
        config,
        given,
        cache=cache,
        sketch=sketch,
        resolve=runs.load_run_config,
        look_at_folder=look_at_folder,
        trainings=trainings,
        processes=processes,
    )


def _refuse_sketch(sketch: Path | None) -> None:
    if sketch is not None:
        raise click.UsageError("--sketch goes with --dry-run: a student is trained from a cache")


@main.command()
@training_options
@JSON
def train(*, extend: bool, dry_run: bool, sketch: Path | None, **options: Any) -> None:
    """Train one student through its phases, or resume it."""
    refuse_sharding(enter_launch().sharding, model="student", divides=True)
    if dry_run:
        looking = partial(runs.look_at_training, extends=extend)
        _preview(options, looking, sketch, trainings=("",), processes=enter_launch().size).show()
        return
    _refuse_sketch(sketch)
    settings, of_recipe = _load(options)

    from vlm_distill_cache.stage2_student.training.log import phase_values, summarise
    from vlm_distill_cache.stage2_student.training.preparation import cache_notes

    refuse_uncut(settings.student, settings.teacher)
    runs.set_up_libraries()
    if enter_launch().size > 1:
        # They wait for each other inside torch, where no handler of Python's runs.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    refuse_foreign_folder(Path(settings.output))
    in_run = runs.ARM in os.environ
    if in_run or enter_launch().launcher == "torchrun":
        end_with_parent()
    caches = open_caches(settings)
    if enter_launch().rank == 0 and not in_run:
        if (processes := enter_launch().size) > 1:
            tell(f"Trains with {processes} processes, started by {enter_launch().launcher}")
        for note in cache_notes(settings, caches):
            tell(note)
    with explain_lost_processes(Path(settings.output)):
        result = runs.train_alone(settings, caches=caches, extends=extend)
    if enter_launch().rank == 0:
        kept, of_best = best_on_the_way(Path(settings.output), result.scores)
        answer(student=result.final, output=settings.output, steps=len(result.log), last=(result.log or [{}])[-1])
        answer(phases=phase_values(result.log), scores=result.scores, best=kept)
        say(summarise(result.log))
        if of_recipe:
            say(of_recipe)
        say(f"Student: {result.final}")
        if not in_run:  # which says it of all its students
            for line in of_best:
                say(line)
            tell(f"Next: distill evaluate {quoted(result.final)} --cache {quoted(settings.cache)}")


@main.command()
@training_options
@click.option("--nproc", type=click.IntRange(min=1), default=1, show_default=True, help="Training processes.")
@click.option("--teacher", help="The teacher that a student pruned:KEEP is cut out of: a folder or a name on the hub.")
@JSON
def run(*, nproc: int, extend: bool, dry_run: bool, sketch: Path | None, **options: Any) -> None:
    """Train `sft`, the baseline without a teacher, and the distilled student; score both, write the report."""
    launch = enter_launch()
    refuse_sharding(launch.sharding, model="student")
    if launch.size > 1:
        raise LaunchError(
            f"{launch.launcher} started {launch.size} processes of `distill run`, which starts its own: run it once, with "
            f"--nproc {launch.size}; or train by `distill train`, which {launch.launcher} may start"
        )
    looking = partial(runs.look_at_run, extends=extend)
    look = partial(_preview, options, looking, trainings=COMPARED, processes=nproc)
    if sketch is None and "teacher_cache" in read_yaml(options["config"]):
        both, _, cache = _given(dict(options))
        given = [f"--{name}={options[name]}" for name in ("data", "images") if options[name] is not None]
        with stopped_by_sigterm():
            build_first(["--config", str(both), *given], cache, look, dry_run=dry_run)
    elif dry_run:
        look(sketch).show()
    if dry_run:
        return
    _refuse_sketch(sketch)
    settings, of_recipe = _load(options)
    with stopped_by_sigterm():
        summary = runs.run(settings, processes=nproc, extends=extend, say=tell)
    lines = summary.table.splitlines()
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    folders = {name: summary.output / name for name in COMPARED}
    best = {name: best_on_the_way(folder, read_evaluations(folder)) for name, folder in folders.items()}
    answer(**vars(summary), scores=read_scores(summary.output), notes=notes)
    answer(best={name: kept for name, (kept, _) in best.items() if kept is not None})
    # What a new run's scores do not tell was said before it trained.
    say("\n".join(["", *(line for line in lines if not (summary.fresh and line.startswith("note: "))), ""]))
    if summary.fresh:
        say(f"Done in {summary.seconds:.0f} s.")
    else:
        say(f"Everything in {summary.output} is up to date.")
    if of_recipe:
        say(of_recipe)
    for line in (line for _, lines in best.values() for line in lines):
        say(line)
    say(f"Report: {summary.report}")
    tell(f"Next: distill export {quoted(summary.output / 'distilled' / 'final')} --output FOLDER")


@main.command()
@training_options
@TRAINING_JOB
@ENGINE_OPTIONS
@JSON
def submit(**options: Any) -> None:
    """Have Ray or SLURM run a training, by torch's launcher: that of `train`, or all of `run` on one machine."""
    answer(**submit_training(options, given=_given, load=_load))


@main.command()
@estimated_options
@click.option("--memory", help="Memory of one device, such as 24GB: say what fits; default: only what each way takes.")
@click.option("--price", type=Finite(min=0), help="Of this machine for an hour; adds the cost to the hours.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Steps of each phase that are timed."
)
@figures_file(ESTIMATE)
def estimate(*, memory: str | None, price: float | None, steps: int, json_file: Path | None, **options: Any) -> None:
    """Predict memory, hours and cost of a training from a few steps of it; takes the options of `train`."""
    if enter_launch().size > 1:
        raise LaunchError("distill estimate is run once: it tells what one process takes, and how many would be needed")
    limit = None if memory is None else parse_bytes(memory, "--memory")
    options["output"] = options["output"] or Path("OUTPUT")
    from vlm_distill_cache.common.tools.outlook import looking_only
    from vlm_distill_cache.stage2_student.train import train as train_steps
    from vlm_distill_cache.stage2_student.training.estimate import estimate as measure
    from vlm_distill_cache.stage2_student.training.estimate import estimate_text

    runs.set_up_libraries()
    with looking_only():
        settings, _ = _load(options)
        refuse_uncut(settings.student, settings.teacher)
        figures = measure(settings, open_caches(settings), train=train_steps, steps=steps, memory=limit, price=price)
    say(estimate_text(figures))
    answer(**figures.to_dict())
    if json_file:
        write_json_atomic(json_file, figures.to_dict())


@main.command()
@click.option("--teacher", required=True, help="What to cut the student out of: a folder or a name on the hub.")
@click.option("--data", required=True, help="Data to measure on which heads, channels and layers matter.")
@click.option("--images", type=FOLDER, help="Folder that relative image paths start from.")
@click.option("--output", required=True, type=NewFolder(), help="New folder.")
@pruning_options
@click.option("--template", help="Prompt template; default: the teacher's.")
@JSON
def prune(
    teacher: str, keep: Kept, data: str, images: Path | None, output: Path, template: str | None, **how: Any
) -> None:
    """Cut a smaller student out of a teacher, to be trained with its hidden states."""
    from vlm_distill_cache.data.registry import open_dataset
    from vlm_distill_cache.data.sample import iterate_readable
    from vlm_distill_cache.stage2_student.batches.share import some_samples
    from vlm_distill_cache.stage2_student.prune.cut import prune_directory

    runs.set_up_libraries()
    settings = PruningConfig(**how)
    dataset = some_samples(open_dataset(data, images=images), settings.samples)
    pruning = prune_directory(
        model_folder(teacher, what="--teacher").path,
        output,
        kept=keep,
        how=settings,
        samples=iterate_readable(dataset),
        template=template,
        described={"data": dataset.fingerprint()},
    )
    same = len(set(pruning.sizes)) == 1
    answer(output=output, widths=pruning.sizes[0] if same else None, layers=pruning.layers, sizes=pruning.sizes)
    say(f"{output}: {pruning}")
    tell(f"Next: distill run --student {quoted(output)} --cache CACHE --output FOLDER")


def _is_report(content: bytes) -> bool:
    """Whether a file is what `evaluate` wrote; those of a run hold more, and are its own."""
    parts = [(*left, *more) for left in ((), ("unreadable",)) for more in ((), WRITTEN)]
    return any(json_of("scores", "items", *part, others=False)(content) for part in parts)


@main.command()
@click.argument("student", shell_complete=complete_folder)
@click.option("--data", help="Data set of the held-out items; default: the one it was trained on.")
@IMAGES
@click.option(
    "--cache",
    type=CacheLocation(),
    help="Compare with this cache's teacher (a folder or an address); default: the one of its training.",
)
@click.option("--split", type=click.Choice(get_args(Split)), help="Split of the held-out items; default: test.")
@click.option("--limit", type=click.IntRange(min=1), help="Score at most so many items.")
@click.option("--output", type=ResultFile(_is_report), help="JSON file to write.")
@click.option(
    "--oracle", is_flag=True, help="Choose visual tokens by where the teacher of --cache looked on the same pictures."
)
@click.option("--card", is_flag=True, help="Write the scores into the card (README.md) in the student's folder, too.")
@quantise_option
@JSON
def evaluate(
    student: str,
    *,
    data: str | None,
    images: str | None,
    cache: str | None,
    split: Split | None,
    limit: int | None,
    output: Path | None,
    oracle: bool,
    card: bool,
    quantise: Sequence[Quantisation],
) -> None:
    """Score a trained student: its `final` folder, or that of a name on the hub."""
    from vlm_distill_cache.stage2_student.scores.card import write_card
    from vlm_distill_cache.stage2_student.scores.held_out import (
        EVALUATE_OPTION,
        card_scores,
        scoring_notes,
        unreadable_note,
    )
    from vlm_distill_cache.stage2_student.scores.oracle import followed, read_oracle, refuse_no_choice
    from vlm_distill_cache.stage2_student.trained_student import (
        evaluate_quantised,
        evaluate_student,
        open_compared,
        open_model,
        open_student,
    )

    if oracle and (cache is None or card):
        raise ConfigError(
            "--oracle: "
            + ("a card says how the student alone scores; leave --card out" if card else "add --cache, of these items")
        )
    runs.set_up_libraries()
    folder = trained_folder(student)
    if card and folder.revision:
        raise ConfigError(
            f"--card: {student} is a copy of the hub's; give a folder of your own, then `distill push` it"
        )
    unknown = cache is not None and not (folder.path / PROVENANCE).exists()
    if card and unknown:
        raise ConfigError(f"--card: {student} has no {PROVENANCE}, from which a card is written; leave the option out")
    opened = open_model(folder.path, cache) if unknown and cache else open_student(folder.path)
    settings = config_from_dict(TrainConfig, opened.provenance["config"], where=student)
    how = settings.evaluation
    how = replace(how, data=data or how.data, images=images or how.images, limit=limit or how.limit)
    how = replace(how, split=split or how.split)
    settings = replace(settings, cache=cache or settings.cache, evaluation=how)
    compared, notes = open_compared(opened, settings, given=cache is not None)
    if oracle:
        refuse_no_choice(opened.model, student)
        notes.append(
            f"visual tokens were chosen by where the teacher of {cache} looked on the same pictures (--oracle)"
        )
    unfit = None if cache else notes.append
    with followed(read_oracle(compared) if oracle and compared is not None else None):
        quantised = evaluate_quantised(opened, settings, compared, quantise, unfit=unfit)
        report = evaluate_student(opened, settings, compared, unfit=unfit)
    stored = report.to_dict() | quantised_values(report, quantised)
    scorable = bool({"likelihood", "questions"} & report.scores.keys())
    trained = compared is None or compared.manifest_hash in opened.provenance["caches"].values()
    # Another cache's data are not what the student has seen.
    seen = compared if trained or (settings.data is None and how.data is None) else None
    notes += scoring_notes(settings, seen, scorable=scorable, option=EVALUATE_OPTION, known=not unknown)
    notes += filter(None, [unreadable_note(report.unreadable)])
    tokens = token_words(folder.path)
    if oracle:
        tokens.pop("visual_tokens", None)  # its own choice, which was not followed
    notes = list(dict.fromkeys([*notes, *tokens.values()]))
    answer(student=student, **stored, notes=notes, **tokens)
    own = folder.path.resolve()
    name = folder.name if folder.revision else own.parent.name if own.name == FINAL else own.name
    say("\n".join([render_table({name: report, **reports_of(quantised)}), *quantised_lines(report, quantised)]))
    if card:
        scores = card_scores({name: report}, settings, compared, notes, trained=trained)
        write_card(folder.path, opened.provenance, scores=scores)
    for note in notes:
        say(f"note: {note}")
    if output is not None:
        write_json_atomic(output, stored)
        say(f"Scores: {output}")
    if not unknown and not oracle:
        tell(f"Next: distill export {quoted(student)} --output FOLDER")


@main.command()
@click.argument("output", type=FOLDER)
@JSON
def report(output: Path) -> None:
    """Write the HTML report of a run's folder again."""
    runs.write_report_again(output)
    answer(report=output / runs.REPORT)
    say(f"Report: {output / runs.REPORT}")


main.add_command(compare)


@main.command()
@click.argument("student", shell_complete=complete_folder)
@click.option("--output", required=True, type=NewFolder(), help="New folder.")
@click.option(
    "--layout",
    type=click.Choice(["auto", "published", "llava-hf", "adapter", "gguf"]),
    default="auto",
    show_default=True,
    help="auto: for from_pretrained, a LLaVA where the student is one; published: for the code of MobileVLM's, CompoDistill's "
    "or LLaVA's authors; llava-hf: the library's LLaVA; adapter: what peft adds to the model that training started from; gguf: for "
    "llama.cpp.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the weights; default: as they are stored.",
)
@click.option(
    "--quantise",
    type=click.Choice(QUANTISATIONS),
    help="The language model's weights, by bitsandbytes; in gguf as Q8_0 or Q4_0.",
)
@JSON
def export(student: str, output: Path, layout: str, dtype: str | None, quantise: Any) -> None:
    """Write a trained student in another layout or precision, for other programs."""
    from vlm_distill_cache.stage2_student.trained_student import export_student

    runs.set_up_libraries()
    written = export_student(trained_folder(student).path, output, layout=layout, dtype=dtype, quantise=quantise)
    answer(output=output, layout=layout, dtype=written, quantise=quantise)
    say(f"Exported to {output}: layout {layout}, {written}{f', {quantise}' if quantise else ''}")
    if layout not in FOR_OTHERS:
        tell(f"Next: distill evaluate {quoted(output)}")


@main.command()
@click.argument("student")
@click.argument("repository")
@click.option("--which", type=click.Choice(list(COMPARED)), help="The student of a run to push; default: distilled.")
@click.option("--revision", help="Branch to push to, made if it is not there; default: main.")
@click.option("--public", is_flag=True, help="Make a new repository public, or push to a public one; default: private.")
@click.option("--overwrite", is_flag=True, help="Replace what is there of another model.")
@click.option(
    "--message", default="Push a student of vlm-distill-cache", show_default=True, help="Title of the commit."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be pushed.")
@JSON
def push(
    student: str,
    repository: str,
    *,
    which: str | None,
    revision: str | None,
    public: bool,
    overwrite: bool,
    message: str,
    dry_run: bool,
) -> None:
    """Bring a student with its card to the Hugging Face Hub, as model REPOSITORY (org/name); again after a failure.

    STUDENT is the folder of a run or a training, a `final` folder or an export. A new repository is private.
    """
    from vlm_distill_cache.stage2_student.scores.publish import push_student, student_folder

    name = hub_name(repository)
    if name is None or (revision and name.revision):
        raise ConfigError(
            f"{repository}: expected the repository as org/name, org being you or an organisation of yours, and a branch by "
            "--revision"
        )
    place = name._replace(revision=revision or name.revision)
    folder = student_folder(Path(student), which)
    runs.set_up_libraries()
    if not message.strip():
        raise click.BadParameter("--message: expected a title for the commit")
    done = push_student(folder, place, public=public, overwrite=overwrite, message=message, dry_run=dry_run)
    answer(
        student=folder, place=str(done.place), **{k: v for k, v in vars(done).items() if k != "place"}, dry_run=dry_run
    )
    seen = "private" if done.private else "public"
    say(f"{folder} -> {done.place} ({'' if done.exists else 'new, '}{seen})")
    for what, names in (("send", done.new), ("replace", done.changed)):
        for file, size in names.items() if dry_run or what == "replace" else ():
            say(f"  {what}: {file} ({size:,} bytes)")
    if done.same:
        say(f"  there already: {len(done.same)} files, {sum(done.same.values()):,} bytes")
    for file in done.foreign:
        say(f"  remove: {file}")
    if public and done.private:
        say("note: the repository is private and stays so; its settings on the hub change that")
    total = sum((done.new | done.changed).values())
    if dry_run:
        say(f"Dry run: {len(done.new | done.changed)} files, {total:,} bytes would be sent; nothing was changed")
        return
    say(
        f"Pushed {len(done.new | done.changed)} files, {total:,} bytes; all are there as they are here"
        if done.pushed
        else "Everything is there already"
    )
    if read_provenance(folder).get("export", {}).get("layout") not in FOR_OTHERS:
        tell(f"Next: distill evaluate {quoted(str(done.place))}")


@main.command(name="import")
@click.argument("checkpoint", shell_complete=complete_folder)
@click.option("--output", required=True, type=NewFolder(), help="Folder to write.")
@click.option(
    "--vision-tower", help="CLIP, where the checkpoint does not hold its tower: a folder or a name on the hub."
)
@JSON
def import_checkpoint(checkpoint: str, output: Path, vision_tower: str | None) -> None:
    """Write a published MobileVLM, CompoDistill or LLaVA-1.5 as a student or teacher of ours: one folder, safetensors.

    CHECKPOINT is a folder or a name on the hub (org/name[@revision]).
    """
    from vlm_distill_cache.common.models.convert import convert_published

    runs.set_up_libraries()
    tower = None if vision_tower is None else model_folder(vision_tower, what="--vision-tower").path
    convert_published(model_folder(checkpoint, what="checkpoint").path, output, vision_tower=tower)
    answer(output=output)
    say(f"Imported into {output}")
    tell(
        f"Next: {by_make('make distill STUDENT=', 'distill run --student ')}{quoted(output)}, or "
        f"{by_make('make teacher-cache TEACHER=', 'teacher-cache build --teacher ')}{quoted(output)}"
    )


main.add_command(suite)
main.add_command(select_tokens)


if __name__ == "__main__":
    main()

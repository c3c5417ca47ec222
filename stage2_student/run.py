"""`distill run`: baseline and distilled student, their scores, one report; done once, resumed if killed.

The first thing is to see whether there is anything to do. That path imports no torch: a second call answers
in well under two seconds. ``OUTPUT/run.json`` says what the folder belongs to, whether it is finished, and what the run
left, by digests: what is lost or damaged since is made again from what is there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_distill_cache.common.cache.document_rules import EVALUATION
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.config import config_from_dict, config_to_dict, last_given, save_config
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, TransferError
from vlm_distill_cache.common.files.atomic import clean_stale, remove, write_bytes_atomic
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.files.rules import check
from vlm_distill_cache.common.files.signed import find_damage, list_files, read_signed, write_signed
from vlm_distill_cache.common.hub import public_name
from vlm_distill_cache.common.locations import is_url, nearest_path, secret_locations
from vlm_distill_cache.common.remotes.mirror import local_folder
from vlm_distill_cache.common.terminal.command_line import leave_one_core, quiet_libraries, run_command, said_so_far
from vlm_distill_cache.common.tools.outlook import Outlook
from vlm_distill_cache.common.tools.trust import open_trusted
from vlm_distill_cache.stage2_student.config import (
    EvaluationConfig,
    TrainConfig,
    as_cut,
    describe,
    scoring_options,
    without_secrets,
    without_teacher,
)
from vlm_distill_cache.stage2_student.final_folder import (
    FINAL,
    PROVENANCE,
    look_at_final,
    read_provenance,
    refuse_other_student,
)
from vlm_distill_cache.stage2_student.pruned_folder import (
    FOLDER,
    kept_share,
    pruned_damage,
    pruning_record,
    refuse_uncut,
)
from vlm_distill_cache.stage2_student.scores.results import (
    HEADLINE,
    SCORES,
    EvaluationReport,
    other_items_note,
    read_scores,
    render_table,
    table_rows,
)
from vlm_distill_cache.stage2_student.scores.token_words import token_words
from vlm_distill_cache.stage2_student.training.extension import as_begun, differing_options, earlier_training
from vlm_distill_cache.stage2_student.training.output_folder import (
    CONFIG,
    STAMP,
    claim_output,
    drop_pixels,
    refuse_foreign_folder,
    with_shared_pixels,
)
from vlm_distill_cache.stage2_student.training.recipe_caches import refuse_other_caches
from vlm_distill_cache.stage2_student.training.resolve import given_options, open_caches, resolve_config, with_folders
from vlm_distill_cache.stage2_student.training.stamp import BASELINE, COMPARED, DISTILLED, read_stamp, refuse_other_run

if TYPE_CHECKING:
    from vlm_distill_cache.stage2_student.train import AfterStep, TrainResult

TABLE, REPORT = "table.txt", "report.html"
TEACHER = "teacher"
ARM = "DISTILL_ARM"  # set in the processes of a run's student: what comes next is the run's to say
LAUNCHER = "vlm_distill_cache.stage2_student.training.several"
# What a run leaves beside its students' own files, which their PROVENANCE lists.
LEFT = (TABLE, REPORT, SCORES, *(f"{name}/{part}" for name in COMPARED for part in (SCORES, f"{FINAL}/{PROVENANCE}")))
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run left."""

    output: Path
    table: str
    report: Path
    fresh: bool
    seconds: float


def load_run_config(path: Path | None, overrides: Sequence[str], *, cache: str | Path | None = None) -> TrainConfig:
    """Resolve a run's configuration: preset by the cache's teacher, then a recipe, then YAML, then overrides.

    ``cache`` stands above all of them; None: they name it.

    Raises:
        ConfigError: For an unknown or unusable option, or if nothing names a cache or an output.
        CacheMismatchError: If a loss of the recipe would be another one with the cache.
    """
    overrides = [*overrides, *([] if cache is None else [f"cache={json.dumps(str(cache))}"])]
    recipe, given = given_options(path, overrides)
    places = {name: last_given(given, name) for name in ("cache", "output")}
    for name, place in places.items():
        if not place:
            raise ConfigError(f"{name}: none is given; add --{name} FOLDER, or {name}: FOLDER to the file of --config")
    if not is_url(places["cache"]) and not Path(places["cache"]).is_dir():
        raise ConfigError(
            f"cache: {places['cache']} is neither a folder nor an address (s3://, hf://datasets/, https://); relative paths "
            f"start from the working directory{nearest_path(places['cache'])}"
        )
    width = int(read_plan(local_folder(places["cache"]), sketch=True).teacher.get("hidden_size", 1 << 20))
    config = resolve_config(path, overrides, teacher_width=width)
    if recipe is not None:
        refuse_other_caches(config, recipe, given)
    return config


def run(
    config: TrainConfig, *, processes: int = 1, extends: bool = False, say: Callable[[str], None] = _log.info
) -> RunSummary:
    """Train the SFT baseline and the distilled student, score both, write the report.

    Whatever is finished is not done again: a complete run, a trained student, a training's checkpoints, a
    score. Each cache is opened once.

    The configuration is of the distilled student; its ``output`` gets a folder for each student. Several training
    processes are started with torch's launcher. With ``extends`` a finished run goes on to more steps of its last phase.
    ``say`` is told what happens.

    Raises:
        ConfigError: If the folder belongs to another run, naming what differs.
        CacheMismatchError: If the cache fits neither data nor student.
    """
    began = time.monotonic()
    config = as_begun(with_folders(config))
    output = Path(config.output)
    caches = open_caches(config)
    hashes = {place: cache.manifest_hash for place, cache in caches.items()}
    cache = caches.get(config.cache) or open_trusted(config.cache, verify=config.verify)  # phases may all have others
    stamp = {"run": describe(config, hashes), "evaluation": describe_scoring(config, cache, hashes)}
    previous = read_stamp(output)
    refuse_other_run(output, previous, stamp, hashes=hashes, extends=extends)
    finished = previous.get("finished") == fingerprint(stamp) and "left" in previous
    lost = find_lost(output, previous["left"]) if finished else []
    if finished and kept_share(config.student) is not None:
        lost += pruned_damage(output / FOLDER)
    if lost:
        say(f"parts of this finished run are lost or damaged and are made again: {'; '.join(lost)}")
    fresh = bool(lost) or not finished
    if fresh:
        set_up_libraries()
        with claim_output(output, *(cache.path for cache in caches.values())):
            for name in COMPARED:
                clean_stale(output / name)  # of a process killed while it scored
            train_and_score(config, caches, cache, stamp, hashes, processes=processes, extends=extends, say=say)
    elif config.evaluation.every is not None and not (output / DISTILLED / "evaluation.jsonl").exists():
        say("evaluation.every: this run is finished, so that no step is left to be scored on the way")
    if not fresh and not (output / CONFIG).exists():  # as versions before left it
        with contextlib.suppress(OSError):  # a finished run may lie on a read-only disk
            save_config(without_secrets(config), output / CONFIG)
    return RunSummary(
        output=output,
        table=(output / TABLE).read_text(),
        report=output / REPORT,
        fresh=fresh,
        seconds=time.monotonic() - began,
    )


def train_and_score(
    config: TrainConfig,
    caches: Mapping[str, TeacherCache],
    cache: TeacherCache,
    stamp: Mapping[str, Any],
    hashes: Mapping[str, str],
    *,
    processes: int,
    extends: bool,
    say: Callable[[str], None],
) -> None:
    """Do what is left of a run, scored against ``cache``; the caller holds its folder.

    Raises:
        ConfigError: If a student there is of another run.
    """
    from vlm_distill_cache.stage2_student.scores.held_out import probe_items, unreadable_note
    from vlm_distill_cache.stage2_student.training.checks import check_losses, check_machine
    from vlm_distill_cache.stage2_student.training.preparation import cache_notes, prepare

    output = Path(config.output)
    check_machine(config, processes=processes, starts=processes)
    check_losses(config, caches)  # else a misfit of the distilled student shows when the baseline is trained
    if extends:  # before the folder is another run's
        from vlm_distill_cache.stage2_student.train import resume_point

        for arm in arms(with_pruned_student(config, caches, say=say)).values():
            resume_point(arm, prepare(arm, caches), extends=True)
    for note in cache_notes(config, caches):
        say(note)
    notes = probe_items(config, cache)
    for note in notes:  # before hours go into training
        say(f"note: {note}")
    told = config_to_dict(without_secrets(config))
    state = {**stamp, "config": told, "notes": notes, "left": {}, "finished": None}
    write_signed(output / STAMP, state)
    save_config(without_secrets(config), output / CONFIG)
    trained = arms(with_pruned_student(config, caches, say=say))
    done = [name for name, arm in trained.items() if is_trained(arm, hashes, extends=extends, say=say)]
    if not done:
        # What only the distilled student shows to be wrong, before hours go into the baseline.
        prepare(trained[DISTILLED], caches)
    for name, arm in trained.items():
        if name in done:
            say(f"{name}: trained already")
            continue
        resumed = ", from its last checkpoint" if any(output.glob(f"{name}/checkpoints/step-*")) else ""
        say(f"{name}: training {describe_phases(arm)}{resumed}")
        train_arm(arm, processes=processes, extends=extends, caches=caches)
    drop_pixels(config)
    scores = {name: evaluate_arm(output / name, config, cache, stamp["evaluation"], say=say) for name in trained}
    found = [unreadable_note(report.unreadable) for report in scores.values()]
    same_test = (config.evaluation.data, config.evaluation.split) == (None, EvaluationConfig().split)
    # Put there by whoever built the cache, of the test set of the cache's own data.
    if (known := cache.plan.teacher.get("evaluation")) and same_test:
        scores[TEACHER] = EvaluationReport.from_dict(known)
        found.append(other_items_note(scores[TEACHER], scores[DISTILLED]))
    for note in dict.fromkeys(note for note in found if note and note not in notes):
        say(f"note: {note}")
    notes = list(dict.fromkeys([*notes, *filter(None, found)]))
    state["notes"] = notes
    write_signed(output / SCORES, {name: report.to_dict() for name, report in scores.items()})
    table = "\n".join([render_table(scores, COMPARED), *(f"note: {note}" for note in notes)])
    write_bytes_atomic(output / TABLE, table.encode())
    write_signed(output / STAMP, state)  # the report shows its notes
    write_report(output, config, cache)
    write_signed(output / STAMP, {**state, "left": list_files(output, LEFT), "finished": fingerprint(stamp)})


def describe_scoring(config: TrainConfig, cache: TeacherCache, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What changes the scores of a trained student: the options, and what of the files they name is not the student's.

    Raises:
        DataError: If the held-out items cannot be opened.
    """
    how = scoring_options(config)
    if config.cache not in hashes:
        how["cache"] = cache.manifest_hash
    data = config.evaluation.data
    place = Path((data or "").partition(":")[0])
    if data and (place.exists() or (("*" in data or "{" in data) and place.parent.is_dir())):  # files, which may change
        from vlm_distill_cache.data.registry import open_dataset  # numpy: only where it is needed

        images = config.evaluation.images or config.images
        opened = open_dataset(data, split=config.evaluation.split, images=None if images is None else Path(images))
        how["items"] = opened.fingerprint()
    return how


def find_lost(output: Path, left: Mapping[str, Any]) -> list[str]:
    """What of the files that a run left is no longer there, or not as it was, a text each; reads all of them."""
    lost = find_damage(output, left)
    for name in COMPARED:
        with contextlib.suppress(FileNotFoundError):  # it is among those that the run left
            lost += look_at_final(output / name / FINAL)[1]
    return lost


def is_trained(arm: TrainConfig, hashes: Mapping[str, str], *, extends: bool, say: Callable[[str], None]) -> bool:
    """Whether a student is there and whole; what is damaged is said.

    Raises:
        ConfigError: If it is another one than it is to be, or not one that it extends.
    """
    folder = Path(arm.output)
    if extends and earlier_training(folder, arm, hashes) is not None:
        return False
    identity, why = fingerprint(describe(arm, hashes)), partial(differing_options, folder, arm, hashes)
    damage = refuse_other_student(folder / FINAL, identity, why=why)
    if damage:
        say(f"{folder.name}: made again: {damage[0]}")
    return damage == []


def arms(config: TrainConfig) -> dict[str, TrainConfig]:
    """The students of a run, by the name of their folder."""
    config = with_shared_pixels(config)
    students = {BASELINE: without_teacher(config), DISTILLED: config}
    return {name: replace(student, output=str(Path(config.output) / name)) for name, student in students.items()}


def with_pruned_student(
    config: TrainConfig, caches: Mapping[str, TeacherCache], *, say: Callable[[str], None]
) -> TrainConfig:
    """Cut a student ``pruned:KEEP`` out of its teacher into the run's folder, once; others are as they are.

    Raises:
        ConfigError: If the cache's data cannot be opened.
        ModelError: If the teacher cannot be pruned, or is not the cache's.
    """
    kept = kept_share(config.student)
    if kept is None:
        return config
    folder = Path(config.output) / FOLDER
    if os.path.lexists(folder) and (damage := pruned_damage(folder)):
        say(f"{config.student}: cut again: {damage[0]}")
        remove(folder)
    if folder.is_dir():
        say(f"{config.student}: cut out of {public_name(config.teacher or '')} already")
    else:
        from vlm_distill_cache.stage2_student.prune.for_run import prune_for_cache  # torch

        say(f"{config.student}: cutting it out of {public_name(config.teacher or '')}")
        say(prune_for_cache(config, caches[str(config.phase(config.phases[0]).cache)], folder, kept=kept))
    return as_cut(config, folder)


def train_arm(
    arm: TrainConfig, *, processes: int, extends: bool = False, caches: Mapping[str, TeacherCache] | None = None
) -> None:
    """Train one student here, or in processes of their own, which open the caches themselves.

    Either way no other process may train in its folder meanwhile.

    Raises:
        ConfigError: If a process failed; its own message stands above.
    """
    folder = Path(arm.output)
    if processes == 1:
        from vlm_distill_cache.stage2_student.train import train  # torch: only when there is something to train

        with claim_output(folder):
            train(arm, caches=caches, extends=extends)
        return
    folder.mkdir(parents=True, exist_ok=True)
    public = without_secrets(arm)
    save_config(public, folder / CONFIG)
    launcher = [sys.executable, "-m", LAUNCHER, "--standalone", f"--nproc_per_node={processes}"]
    ours = ["-m", "vlm_distill_cache.stage2_student.cli", "train", "--config", str(folder / CONFIG)]
    command = [*launcher, *ours, "--cache", public.cache, "--output", arm.output, *(["--extend"] if extends else [])]
    # One thread a process is what torch's launcher takes too, with a page of advice.
    if run_command(
        command,
        {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            **said_so_far(),
            **secret_locations([arm.cache, *(caches or {})]),
            ARM: "1",
        },
    ):
        raise ConfigError(f"training of {folder} in {processes} processes failed; see the messages above")


def train_alone(
    config: TrainConfig,
    *,
    caches: Mapping[str, TeacherCache] | None = None,
    after_step: AfterStep | None = None,
    extends: bool = False,
) -> TrainResult:
    """Train one student through its phases, or resume it; nobody else works in its folder meanwhile.

    The caches are as from `open_caches`, which is called where there are none. ``after_step`` is called after every
    optimizer step with the position and the student, e.g. to evaluate. With ``extends`` a finished training goes on to more
    steps of its last phase.

    Returns:
        The student and its log; losses in ``log`` are float scalars, as ``docs/method.md`` defines them, ``lr`` and
        ``step_s`` (seconds) beside them.

    Raises:
        DistillError: With the remedy, before the first step, if data, cache, student and folder do not fit.
    """
    from vlm_distill_cache.stage2_student.train import train  # torch

    refuse_uncut(config.student, config.teacher)
    config = as_begun(with_folders(config))
    output = Path(config.output)
    refuse_foreign_folder(output)
    caches = caches or open_caches(config)
    with claim_output(output, *(cache.path for cache in caches.values())):
        return train(config, caches=caches, after_step=after_step, extends=extends)


def describe_phases(config: TrainConfig) -> str:
    """A line such as ``dpt 60 steps (lm + logits), dft 400 steps (...)``."""
    parts = []
    for name in config.phases:
        phase = config.phase(name)
        length = f"{phase.steps} steps" if phase.steps is not None else f"{phase.epochs or 0.0:g} epochs"
        parts.append(f"{name} {length} ({' + '.join(phase.losses.active())})")
    return ", ".join(parts)


def look_at_run(outlook: Outlook, config: TrainConfig, caches: Mapping[str, TeacherCache], *, extends: bool) -> None:
    """For a dry run: whether the folder is this run's, and the held-out items can be scored."""
    from vlm_distill_cache.stage2_student.scores.held_out import probe_items
    from vlm_distill_cache.stage2_student.training.preview import look_at_extension

    output = Path(config.output)
    with outlook.checking():
        previous = read_stamp(output)
        # Of a cache that is not there yet nobody knows the hash.
        there = previous.get("run", {}).get("cache") or ""
        hashes = {place: cache.manifest_hash or there for place, cache in caches.items()}
        stamp = {"run": describe(config, hashes)}
        refuse_other_run(output, previous, stamp, hashes=hashes, extends=extends)
        if extends and all(cache.manifest_hash for cache in caches.values()):
            trained = config if kept_share(config.student) is None else as_cut(config, output / FOLDER)
            look_at_extension(arms(trained).values(), caches)
        if previous.get("finished") and previous["run"] == stamp["run"]:
            outlook.lines.append("  it is finished: what is there is checked, and nothing trained again")
    with outlook.checking():
        cache = caches.get(config.cache)
        outlook.lines += [f"  note: {note}" for note in probe_items(config, cache)] if cache is not None else []


def look_at_training(
    outlook: Outlook, config: TrainConfig, caches: Mapping[str, TeacherCache], *, extends: bool
) -> None:
    """For a dry run: whether the folder is this training's, and what is scored on the way can be."""
    from vlm_distill_cache.stage2_student.scores.held_out import probe_items
    from vlm_distill_cache.stage2_student.training.preview import look_at_extension

    output, hashes = Path(config.output), {place: cache.manifest_hash for place, cache in caches.items()}
    with outlook.checking():
        if config.evaluation.every is not None and config.cache in caches and hashes[config.cache]:
            outlook.lines += [f"  note: {note}" for note in probe_items(config, caches[config.cache])]
    with outlook.checking():
        refuse_uncut(config.student, config.teacher)
    with outlook.checking():
        refuse_foreign_folder(output)
        if extends and all(hashes.values()):
            look_at_extension([config], caches)
        elif all(hashes.values()) and (output / FINAL).is_dir():
            identity, why = fingerprint(describe(config, hashes)), partial(differing_options, output, config, hashes)
            refuse_other_student(output / FINAL, identity, why=why)


def evaluate_arm(
    folder: Path, config: TrainConfig, cache: TeacherCache, how: Mapping[str, Any], *, say: Callable[[str], None]
) -> EvaluationReport:
    """Score one student of a run, or read its scores if they are of this student and scored in this way."""
    from vlm_distill_cache.stage2_student.trained_student import evaluate_student, open_student

    trained = read_provenance(folder / FINAL)
    student = [trained["fingerprint"], trained.get("files")]
    what = fingerprint({"student": student, "evaluation": how})
    path = folder / SCORES
    with contextlib.suppress(FileNotFoundError, CacheFormatError):  # scored again
        stored = read_signed(path)
        if stored.get("of") == what:
            return EvaluationReport.from_dict(check(stored, EVALUATION, str(path)))
    say(f"{folder.name}: scoring")
    report = evaluate_student(open_student(folder / FINAL), config, cache)
    write_signed(path, {"of": what, **report.to_dict()})
    return report


def write_report(output: Path, config: TrainConfig, cache: TeacherCache) -> None:
    """Write the HTML page of a run; and the cards of its students.

    Raises:
        ConfigError: If the scores are lost or damaged.
        ModelError: If a student is.
    """
    from vlm_distill_cache.stage2_student.scores.on_the_way import read_evaluations
    from vlm_distill_cache.stage2_student.scores.page.run_page import RunPage, render_run_page, run_costs, run_facts
    from vlm_distill_cache.stage2_student.trained_student import (
        describe_size,
        open_student,
        show_flips,
        show_shift,
        show_taught,
    )
    from vlm_distill_cache.stage2_student.training.log import read_log

    stored = read_scores(output)
    evaluations = {name: EvaluationReport.from_dict(stored[name]) for name in (*COMPARED, TEACHER) if name in stored}
    notes = read_stamp(output).get("notes", [])
    write_cards(output, config, cache, evaluations, notes)
    students = {name: open_student(output / name / FINAL) for name in COMPARED}
    curves = {name: read_log(output / name) for name in COMPARED}
    sizes = {name: describe_size(student) for name, student in students.items()}
    flips, no_flips = show_flips(students, config, cache, evaluations)
    told = run_facts(config, cache, describe_phases(config), students[DISTILLED].provenance["vocabulary"])
    page = RunPage(
        title=f"{told['student']}: distilled from a teacher cache",
        facts=told | {of.replace("_", " "): said for of, said in token_words(students[DISTILLED].path).items()},
        cost=run_costs(sizes, curves, cache),
        curves=curves,
        on_the_way={name: read_evaluations(output / name) for name in COMPARED},
        evaluations=evaluations,
        compared=COMPARED,
        flips=flips,
        no_flips=no_flips,
        taught=show_taught(students, config, cache),
        shift=show_shift(students, config, cache),
        provenance=students[DISTILLED].provenance,
        notes=notes,
    )
    render_run_page(output / REPORT, page)


def write_cards(
    output: Path,
    config: TrainConfig,
    cache: TeacherCache,
    evaluations: Mapping[str, EvaluationReport],
    notes: Sequence[str],
) -> None:
    """Write the cards of a run's students, with the scores of all; those that somebody has edited stay."""
    from vlm_distill_cache.stage2_student.scores.card import GAIN, write_card
    from vlm_distill_cache.stage2_student.scores.held_out import card_scores

    names = {heading: name for name, heading, _ in HEADLINE}
    gains = {names[row.heading]: row.gain for row in table_rows(evaluations, COMPARED)[0] if row.gain is not None}
    for own in COMPARED:
        columns = {name: evaluations[name] for name in sorted(evaluations, key=lambda name: name != own)}
        with contextlib.suppress(FileNotFoundError, CacheFormatError):  # whoever opens the student says so
            write_card(
                output / own / FINAL,
                read_provenance(output / own / FINAL),
                scores=card_scores({**columns, GAIN: EvaluationReport(scores=gains)}, config, cache, notes),
            )


def set_up_libraries() -> None:
    """Leave a core for loading, and silence library messages that mean nothing here."""
    quiet_libraries()
    leave_one_core()
    # Each process of several would say so once; a convolution's gradient is then copied, which changes no value.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft asks for it


def refuse_other_page(output: Path, config: TrainConfig, stamp: Mapping[str, Any]) -> None:
    """Refuse a page of anything but what a run's stamp says that it left.

    Raises:
        ConfigError: If students or scores are not the run's, or not there.
    """
    of_page = {name: entry for name, entry in stamp.get("left", {}).items() if name not in (TABLE, REPORT)}
    problem = (
        next(iter(find_damage(output, of_page)), "") if of_page or "left" not in stamp else "the run is not finished"
    )
    with contextlib.suppress(FileNotFoundError, CacheFormatError):  # whoever opens the student says so
        found = read_provenance(output / DISTILLED / FINAL)["fingerprint"]
        of_run = dict(stamp["run"])
        if kept_share(config.student) is not None:
            of_run["student"] = pruning_record(output / FOLDER)
            of_run.pop("pruning", None)
        if not problem and found != (expected := fingerprint(of_run)):
            problem = f"{output / DISTILLED / FINAL} is another student: fingerprint {found}, expected {expected}"
    if problem:
        raise ConfigError(f"{output}: no page can be written: {problem}; run the same `distill run` command again")


def write_report_again(output: Path) -> None:
    """Write the page of a run's folder, by the configuration that it holds.

    Raises:
        ConfigError: If it holds none.
    """
    stamp = read_stamp(output, remedy="give the folder that `distill run` wrote")
    if "config" not in stamp:
        raise ConfigError(
            f"{output}: no run there ({STAMP}); give the folder that `distill run` wrote, or run the same command again, "
            f"which writes a lost {STAMP} anew"
        )
    config = config_from_dict(TrainConfig, stamp["config"], where=str(output / STAMP))
    refuse_other_page(output, config, stamp)
    set_up_libraries()
    from vlm_distill_cache.stage2_student.trained_student import open_as_trained

    try:
        cache = open_as_trained(config.cache, stamp["run"].get("cache"), verify=config.verify, needed=f"{output} needs")
    except TransferError as error:
        again = f"delete {REPORT} there and run `distill run` as before"
        raise TransferError(f"{error}. Addresses are kept without signatures: if it had one, {again}") from error
    write_report(output, config, cache)
    if stamp.get("left"):
        write_signed(output / STAMP, {**stamp, "left": {**stamp["left"], **list_files(output, [REPORT])}})

"""``distill suite``: published benchmarks asked of a student. Imports no torch before there is something to ask."""

import tempfile
from dataclasses import replace
from pathlib import Path

import click

from vlm_distill_cache.common.terminal.command_line import (
    DRY_RUN,
    FOLDER,
    CacheLocation,
    NewFolder,
    leave_one_core,
    quiet_libraries,
    quoted,
    say,
    tell,
)
from vlm_distill_cache.common.terminal.general import JSON, Command, answer, complete_folder
from vlm_distill_cache.stage2_student.final_folder import trained_folder

SHAPES = "shapes"


@click.command(cls=Command)
@click.argument("student", shell_complete=complete_folder)
@click.argument("benchmarks", shell_complete=complete_folder)
@click.option("--output", required=True, type=NewFolder(), help="Folder for answers, scores and the page; resumed.")
@click.option("--limit", type=click.IntRange(min=1), help="Ask at most so many items of each benchmark.")
@click.option("--only", help="Names of benchmarks or layouts to ask, with commas between; default: all.")
@click.option("--images", type=FOLDER, multiple=True, help="A further folder of pictures; repeatable.")
@click.option("--nproc", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, one a GPU.")
@click.option(
    "--prompts",
    type=click.Choice(["published", "plain"]),
    help="With the instructions that published evaluations put behind a question, or the questions alone. Default: published; "
    "of `shapes` plain, as the drawn data set asks.",
)
@click.option(
    "--cache", type=CacheLocation(), help="A model that is no student of ours reads as one of this cache would."
)
@DRY_RUN
@JSON
def suite(
    student: str,
    benchmarks: str,
    *,
    output: Path,
    limit: int | None,
    only: str | None,
    images: tuple[Path, ...],
    nproc: int,
    prompts: str | None,
    cache: str | None,
    dry_run: bool,
) -> None:
    """Score a student, a teacher or any other model on published benchmarks.

    STUDENT is a folder or a name on the hub. BENCHMARKS is a folder of files as they were published, which are told by what
    they hold; or `shapes`: small benchmarks of drawn scenes, in the same layouts.
    """
    from vlm_distill_cache.data.benchmarks.drawn import write_drawn
    from vlm_distill_cache.stage2_student.suite.opened import find_model
    from vlm_distill_cache.stage2_student.suite.page import write_suite_page
    from vlm_distill_cache.stage2_student.suite.run import DRAWN, SUMMARY, Suite, outlook, run_suite
    from vlm_distill_cache.stage2_student.suite.table import render_outlook, render_suite

    quiet_libraries()
    leave_one_core()
    asked = Suite(
        model=find_model(trained_folder(student), cache),
        benchmarks=output / DRAWN if benchmarks == SHAPES else Path(benchmarks),
        output=output,
        images=images,
        only=tuple(filter(None, map(str.strip, (only or "").split(",")))),
        limit=limit,
        prompts=prompts or ("plain" if benchmarks == SHAPES else "published"),
    )
    if dry_run:
        with tempfile.TemporaryDirectory() as made:
            if benchmarks == SHAPES and not asked.benchmarks.is_dir():
                write_drawn(Path(made))
                asked = replace(asked, benchmarks=Path(made))
            planned = outlook(asked)
        answer(**planned)
        say(render_outlook(planned))
        return
    summary = run_suite(asked, processes=nproc, say=tell)
    page = write_suite_page(output)
    answer(**summary, output=output, page=page)
    say(f"\n{render_suite(summary)}\n")
    say(f"Scores: {output / SUMMARY}")
    say(f"Page: {page}")
    tell(f"Next: distill compare {quoted(output)} OTHER_OUTPUT")

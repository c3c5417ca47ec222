"""The options that `distill train`, `run` and `estimate` share. Imports no torch."""

from collections.abc import Callable
from typing import Any

import click

from vlm_distill_cache.common.terminal.command_line import CONFIG, DRY_RUN, FOLDER, NewFolder, shared_options
from vlm_distill_cache.common.terminal.general import complete_folder, completes, overrides
from vlm_distill_cache.stage2_student.config import PHASE_NAMES, TRACKERS, TrainConfig
from vlm_distill_cache.stage2_student.students.presets import student_names

IMAGES = click.option("--images", shell_complete=complete_folder, help="Folder that relative image paths start from.")
_WHAT = (
    click.option(
        "--student",
        shell_complete=completes(student_names),
        help="A name (mobilevlm: trained from scratch; its size follows the teacher, or add a suffix: mobilevlm-1.7b), a "
        "folder or a name on the hub (org/name[@revision]), or pruned:KEEP, pruned:depth:KEEP (run only).",
    ),
    click.option(
        "--data",
        shell_complete=completes(lambda: ["shapes", "easy-vqa", "photo-scenes"]),
        help="The data the cache was built from; may be left out if it is built in.",
    ),
    IMAGES,
    click.option(
        "--cache",
        shell_complete=complete_folder,
        help="Teacher cache: a folder, s3://..., hf://datasets/... or https://... Needed, here or in the YAML file.",
    ),
    click.option("--output", type=NewFolder(), help="Folder to write to. Needed, here or in the YAML file."),
    click.option(
        "--phases", shell_complete=completes(lambda: list(PHASE_NAMES)), help='Phases to run, in order: "dpt dft sft".'
    ),
    click.option("--seed", type=click.IntRange(min=0), help="Seed of fresh weights and of the order of samples."),
    click.option(
        "--log-with",
        "report_to",
        shell_complete=completes(lambda: [*TRACKERS, "none"], several=True),
        help=f"Where curves are drawn beside the log: {', '.join(TRACKERS)}, several with commas, or none; default: "
        f"{TRACKERS[0]}.",
    ),
    CONFIG,
    overrides(lambda: TrainConfig),
)
estimated_options: Callable[[Any], Any] = shared_options(*_WHAT)
training_options: Callable[[Any], Any] = shared_options(
    *_WHAT,
    click.option(
        "--extend", is_flag=True, help="Go on from the end of a finished training, to more steps of its last phase."
    ),
    DRY_RUN,
    click.option(
        "--sketch",
        type=FOLDER,
        help="With --dry-run: what `teacher-cache build --dry-run --sketch` wrote, in place of a cache that is not built yet.",
    ),
)

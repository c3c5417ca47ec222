"""``distill select-tokens``. Imports no torch before there is something to do."""

from pathlib import Path
from typing import Any, get_args

import click

from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.common.terminal.command_line import (
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
from vlm_distill_cache.stage2_student.config import DecodingSelection, TokenSelection, TrainConfig
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE, trained_folder


@click.command(cls=Command, name="select-tokens")
@click.argument("model", shell_complete=complete_folder)
@click.option("--output", required=True, type=NewFolder(), help="New folder.")
@click.option(
    "--visual-tokens", type=float, help="How many of a picture's visual tokens are fed: a share, or a number."
)
@click.option("--token-selection", type=click.Choice(get_args(TokenSelection)), help="Which ones; default: attention.")
@click.option("--sink-penalty", type=float, help="With sinks: weight of a place's sink score; default: 0.03.")
@click.option(
    "--merge-frames", type=float, help="Leave out what stays as alike as this cosine from picture to picture."
)
@click.option(
    "--decoding-tokens", type=float, help="How many of them a generated token looks at: a share, or a number."
)
@click.option(
    "--decoding-selection", type=click.Choice(get_args(DecodingSelection)), help="Which ones; default: shift."
)
@click.option("--shift-threshold", type=float, help="With shift: when the gaze has shifted; default: 0.75.")
@click.option(
    "--cache", type=CacheLocation(), help="Teacher cache that sinks or gaze are taken from: a folder or an address."
)
@click.option("--data", help="The data the cache was built from, for gaze; may be left out if it is built in.")
@click.option("--images", type=FOLDER, help="Folder that relative image paths start from.")
@click.option("--seed", type=click.IntRange(min=0), help="Of random; default: 0.")
@JSON
def select_tokens(model: str, *, output: Path, cache: str | None, images: Path | None, **options: Any) -> None:
    """Let a finished model feed fewer visual tokens, or look at fewer while it answers; nothing is trained.

    MODEL is a folder or a name on the hub: a student, a teacher, or anybody's.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if images is not None:
        given["images"] = str(images)
    config = config_from_dict(
        TrainConfig, {"cache": cache or "none", "output": str(output), **given}, where="distill select-tokens"
    )

    from vlm_distill_cache.common.models.published import is_published
    from vlm_distill_cache.stage2_student.prune.tokens import select_tokens as select
    from vlm_distill_cache.stage2_student.scores.plain_card import NEEDS_CODE

    quiet_libraries()
    leave_one_core()
    chosen = select(trained_folder(model).path, output, config, cache=cache)
    answer(output=output, **chosen)
    say(f"Written to {output}")
    for line in chosen.values():
        say(f"  {line}")
    if not is_published(output):  # our own classes open nowhere without their code
        say(f"  {NEEDS_CODE}")
    known = (output / PROVENANCE).exists()
    tell(
        f"Next: distill {'evaluate' if known else 'suite'} {quoted(output)}{'' if known else ' BENCHMARKS --output FOLDER'}"
    )

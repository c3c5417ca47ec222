"""The options of `distill prune`: those of `PruningConfig`, and what is kept. Imports no torch."""

from collections.abc import Callable
from typing import Any, get_args

import click

from vlm_distill_cache.common.terminal.command_line import shared_options
from vlm_distill_cache.stage2_student.pruned_folder import (
    DepthImportance,
    Kept,
    PruningConfig,
    WidthImportance,
    parse_kept,
)


class KeptShares(click.ParamType):
    """Shares of a teacher: ``0.5``, ``depth:0.75`` or ``width:0.5,depth:0.75``."""

    name = "share"

    def convert(self, value: str | Kept, param: click.Parameter | None, ctx: click.Context | None) -> Kept:
        """Return what is kept."""
        kept = value if isinstance(value, Kept) else parse_kept(value)
        if kept is None:
            self.fail(
                f"{value!r}: expected a share above 0 and at most 1, such as 0.5, depth:0.75 or width:0.5,depth:0.75",
                param,
                ctx,
            )
        return kept


def _choice(name: str, words: tuple[str, ...], text: str) -> Any:
    default = getattr(PruningConfig(), name)
    flag = f"--{name.replace('_', '-')}"
    return click.option(flag, type=click.Choice(words), default=default, show_default=True, help=text)


pruning_options: Callable[[Any], Any] = shared_options(
    click.option(
        "--keep",
        required=True,
        type=KeptShares(),
        help="Share of heads and channels to keep (0.5), of layers (depth:0.75), or both (width:0.5,depth:0.75).",
    ),
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        default=PruningConfig().samples,
        show_default=True,
        help="Samples to measure on, drawn at random in proportion from each source.",
    ),
    _choice("importance", get_args(WidthImportance), "What heads and channels are ranked by."),
    _choice("depth_importance", get_args(DepthImportance), "What layers are ranked by."),
    _choice(
        "ratios",
        ("layer", "global"),
        "The same share of each layer, or the parts of all layers ranked together (with --importance taylor).",
    ),
    click.option(
        "--spare-first",
        type=click.IntRange(min=0),
        help="Layers at the beginning left as they are; default: 1 of depth, 0 of width.",
    ),
    click.option("--spare-last", type=click.IntRange(min=0), help="The same at the end."),
)

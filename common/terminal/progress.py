"""Progress of long work: a bar on a terminal; in files and pipes a line every 30 s and one at the end."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Never

from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.terminal.command_line import say
from vlm_distill_cache.common.terminal.general import hides_progress

if TYPE_CHECKING:
    from tqdm import tqdm

EVERY_S = 30.0
_COUNTED = "{desc}: {n_fmt}/{total_fmt}%s, {percentage:.0f} %%, {elapsed} elapsed, {remaining} left, {rate_fmt}"
_UNCOUNTED = "{desc}: {n_fmt}%s, {elapsed} elapsed, {rate_fmt}"


class ProgressLines:
    """Replaces the bar where nobody watches; has the methods of ``tqdm`` that are used here."""

    def __init__(self, *, desc: str, total: int | None, unit: str, initial: int, keep: bool, unit_scale: bool) -> None:
        self.n, self.initial, self.total = initial, initial, total
        self._desc, self._unit, self._keep, self._unit_scale = desc, unit, keep, unit_scale
        self._began = self._said = time.monotonic()

    def update(self, count: float = 1) -> None:
        """Count what was done; says where things stand every 30 s."""
        self.n += int(count)
        if time.monotonic() - self._said >= EVERY_S:
            self._say()

    def _say(self) -> None:
        from tqdm import tqdm

        self._said = time.monotonic()
        line = (_COUNTED if self.total else _UNCOUNTED) % (self._unit if self._unit_scale else f" {self._unit}s")
        text = tqdm.format_meter(
            self.n, self.total or 0, self._said - self._began, prefix=self._desc, unit=f" {self._unit}",
            unit_scale=self._unit_scale, initial=self.initial, bar_format=line,
        )  # fmt: skip
        say(text.replace("  ", " ").replace("s/ ", " s/"), err=True)

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._keep and self.n > self.initial:
            self._say()


def hide_library_bars() -> None:
    """Keep the model library's own bars out of files and pipes."""
    from transformers.utils import logging as transformers_logging

    if hides_progress() or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def progress(
    desc: str,
    *,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    shown: bool = True,
    keep: bool = True,
    unit_scale: bool = False,
) -> tqdm[Never] | ProgressLines:
    """Show the progress of some work: a context manager whose ``update(count)`` reports each piece.

    ``total`` is None if unknown, ``initial`` what was done before. Of several processes one shows the progress of all
    (``shown``); none does where the user wants none (--no-progress, TQDM_DISABLE). With ``keep`` the bar stays, or the end
    gets a line; ``unit_scale`` shortens numbers (12.3M).
    """
    from tqdm import tqdm  # not before the environment says whether there are to be bars

    shown = shown and not hides_progress()
    told: dict[str, Any] = {
        "desc": one_line(desc),
        "total": total,
        "unit": unit,
        "initial": initial,
        "unit_scale": unit_scale,
    }
    if shown and not sys.stderr.isatty():
        return ProgressLines(**told, keep=keep)
    return tqdm(**told, leave=keep, disable=not shown, smoothing=0.05, mininterval=0.5)

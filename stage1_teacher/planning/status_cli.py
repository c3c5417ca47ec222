"""``teacher-cache status``."""

import os
from pathlib import Path
from typing import Any

import click

from vlm_distill_cache.common.cache.plan import PLAN
from vlm_distill_cache.common.terminal.command_line import CacheFolder, say
from vlm_distill_cache.common.terminal.engines.jobs import submission_lines, submissions
from vlm_distill_cache.common.terminal.general import JSON, Command, answer
from vlm_distill_cache.stage1_teacher.planning.status import cache_status, status_text, status_values


class _CacheToCome(CacheFolder):
    """A cache, or one that workers were submitted for and none has begun."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path."""
        path = Path(value)
        return path if not path.exists() and submissions(path) else super().convert(value, param, ctx)


@click.command(cls=Command)
@click.argument("cache", type=_CacheToCome())
@JSON
def status(cache: Path) -> None:
    """Say how far a build is: shards done, leased and left, who makes them, their rates, the time that is left.

    What `submit` handed to an engine is listed too, with its logs and the errors of workers that failed.
    """
    submitted = submissions(cache)
    answer(submitted=submitted)
    if (cache / PLAN).exists() or not submitted:
        found = cache_status(cache)
        answer(**status_values(found))
        say(status_text(found))
    else:
        say(f"{cache}: no worker has begun it yet")
    for line in submission_lines(submitted):
        say(f"  {line}")

"""``teacher-cache seal`` and ``status``: of a cache's folder, without its teacher.

What they need is imported when one of them is run, so that help comes at once.
"""

import os
from pathlib import Path
from typing import Any

import click

from vlm_distill_cache.common.terminal.command_line import CacheFolder, say
from vlm_distill_cache.common.terminal.general import JSON, Command, answer


@click.command(cls=Command)
@click.argument("cache", type=CacheFolder())
@JSON
def seal(cache: Path) -> None:
    """Write the manifest of a complete cache from its sidecars."""
    from vlm_distill_cache.common.cache.manifest import seal as seal_cache
    from vlm_distill_cache.common.cache.plan import read_plan
    from vlm_distill_cache.common.cache.sidecar import missing_shards
    from vlm_distill_cache.common.tools.sinks import write_sinks
    from vlm_distill_cache.stage1_teacher.planning.cache_folder import (
        explain_disk_errors,
        refuse_unlisted,
        sealed_names,
    )

    read_plan(cache)  # of a folder that is no cache, it says what it is
    with explain_disk_errors(cache):
        refuse_unlisted(cache, sealed_names(cache))
        if not missing_shards(cache, read_plan(cache)):  # else sealing names them
            write_sinks(cache)
        manifest = seal_cache(cache)
    answer(cache=cache, totals=manifest.totals, shards=len(manifest.shards))
    say(f"Sealed {cache}: {manifest.totals['samples']} samples in {len(manifest.shards)} shards")


class _CacheToCome(CacheFolder):
    """A cache, or one that workers were submitted for and none has begun."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path."""
        from vlm_distill_cache.common.terminal.engines.jobs import submissions

        path = Path(value)
        return path if not path.exists() and submissions(path) else super().convert(value, param, ctx)


@click.command(cls=Command)
@click.argument("cache", type=_CacheToCome())
@JSON
def status(cache: Path) -> None:
    """Say how far a build is: shards done, leased and left, who makes them, their rates, the time that is left.

    What `submit` handed to an engine is listed too, with its logs and the errors of workers that failed.
    """
    from vlm_distill_cache.common.cache.plan import PLAN
    from vlm_distill_cache.common.terminal.engines.jobs import submission_lines, submissions
    from vlm_distill_cache.stage1_teacher.planning.status import cache_status, status_text, status_values

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

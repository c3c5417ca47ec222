"""A whole run in one YAML file: stage two starts stage one as a process, once all that both need has been looked at."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.terminal.command_line import run_command, said_so_far
from vlm_distill_cache.common.terminal.general import has_document
from vlm_distill_cache.common.terminal.next_step import IN_RUN
from vlm_distill_cache.common.tools.outlook import Outlook

_BUILD = (sys.executable, "-m", "vlm_distill_cache.stage1_teacher.cli", "build")


def build_first(options: Sequence[str], cache: str, look: Callable[[Path | None], Outlook], *, dry_run: bool) -> None:
    """Build a cache before it is trained on; one that is there is compared with its options, and used.

    Args:
        options: Of ``teacher-cache build``.
        cache: Its folder; an address is used as it is.
        look: Looks at what stage two needs; it is given a sketch of a cache that is not there yet, else None.
        dry_run: Only look.

    Raises:
        click.exceptions.Exit: If one of the two stages could not start, or the build failed; both have said why.
    """
    built = is_url(cache) or (Path(cache) / MANIFEST).is_file()
    command, environment = [*_BUILD, *options, "--cache", cache], {**os.environ, **said_so_far(), IN_RUN: "1"}
    with tempfile.TemporaryDirectory() as scratch:
        sketch, told = Path(scratch) / "of", Path(scratch) / "told.json"
        sketch.mkdir()
        code = 0
        if not is_url(cache):
            look_at_it, document = [*command, "--dry-run", "--sketch", str(sketch)], dry_run and has_document()
            with told.open("wb") as file:
                code = run_command(
                    [*look_at_it, *(["--json"] if document else [])],
                    environment,
                    output=file if document else None if dry_run else subprocess.DEVNULL,
                )
        first = read_json(told) if told.is_file() and told.stat().st_size else {}
        if dry_run or not built:
            outlook = look(None if built else sketch)
            if not dry_run:
                outlook.lines.clear()
            outlook.before = first
            if dry_run or outlook.problems:
                outlook.show()
        if code:
            raise click.exceptions.Exit(code)
    if not dry_run and not built and (code := run_command(command, environment)):
        raise click.exceptions.Exit(code)

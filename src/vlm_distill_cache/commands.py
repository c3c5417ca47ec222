"""Where the three commands begin: while their libraries are being imported, Ctrl-C ends them without a traceback."""

import os
import sys
from copy import copy
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click


def teacher_cache() -> None:
    """Run ``teacher-cache``."""
    _run("stage1_teacher")


def distill() -> None:
    """Run ``distill``."""
    _run("stage2_student")


def cachectl() -> None:
    """Run ``cachectl``."""
    _run("common")


def group_of(package: str) -> "click.Group":
    """The commands of a package; those that read and write caches have some of stage one's beside them."""
    main: click.Group = import_module(f"vlm_distill_cache.{package}.cli").main
    if package != "common":
        return main
    added = [import_module("vlm_distill_cache.stage1_teacher.imports.cli").import_logprobs]
    group = copy(main)
    group.commands = {**main.commands, **{command.name: command for command in added}}
    return group


def _run(package: str) -> None:
    try:
        command = group_of(package)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again to continue\n")
        sys.stderr.flush()
        os._exit(130)  # libraries are half imported: nothing of theirs is to run any more
    command()

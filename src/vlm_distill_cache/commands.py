"""Where the three commands begin: while their libraries are being imported, Ctrl-C ends them without a traceback."""

import os
import sys
from copy import copy
from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    """The commands of a package; those that read and write caches have some of stage one's beside them, and may open data."""
    main: click.Group = import_module(f"vlm_distill_cache.{package}.cli").main
    if package != "common":
        return main
    added = [import_module("vlm_distill_cache.stage1_teacher.imports.cli").import_logprobs]
    group = copy(main)
    group.commands = {**main.commands, **{command.name: command for command in added}}
    group.context_settings = {**main.context_settings, "obj": _open_data}
    return group


def _open_data(*arguments: Any, **options: Any) -> Any:
    return import_module("vlm_distill_cache.data.questions").open_asked(*arguments, **options)


def _run(package: str) -> None:
    try:
        command = group_of(package)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again to continue\n")
        sys.stderr.flush()
        os._exit(130)  # libraries are half imported: nothing of theirs is to run any more
    command()

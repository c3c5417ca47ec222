"""Where the three commands begin: while their libraries are being imported, Ctrl-C ends them without a traceback."""

import os
import sys
from importlib import import_module


def teacher_cache() -> None:
    """Run ``teacher-cache``."""
    _run("stage1_teacher")


def distill() -> None:
    """Run ``distill``."""
    _run("stage2_student")


def cachectl() -> None:
    """Run ``cachectl``."""
    _run("common")


def _run(package: str) -> None:
    try:
        command = import_module(f"vlm_distill_cache.{package}.cli").main
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again to continue\n")
        sys.stderr.flush()
        os._exit(130)  # libraries are half imported: nothing of theirs is to run any more
    command()

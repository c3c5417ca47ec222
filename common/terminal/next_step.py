"""The command that trains a student from a cache, written so that it works as it is printed."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.recipes.cache_fit import recipe_of
from vlm_distill_cache.common.terminal.command_line import quoted

IN_RUN = "VLM_DISTILL_IN_RUN"
"""Set where a cache is built by what goes on to train from it, so that no next command is proposed."""
DEFAULT_SIGNALS = (LogitCodec.signal, RowAttentionCodec.signal)
"""What stage one keeps, and all that students are trained on, unless told otherwise."""
_DISTILLING = ("dpt", "dft")
DEFAULT_SHAPES = "shapes:images=1500,seed=0"
"""What a plan calls the data set that ``make`` takes where no other is named."""
_DRAWN = re.compile(r"(shapes|photo-scenes)(:[a-z]+=[\d+a-z]+(,[a-z]+=[\d+a-z]+)*)?")


def distill_command(
    plan: Plan,
    cache: str | Path,
    *,
    pictures: int | None = None,
    data: str | None = None,
    images: str | None = None,
    recipe: str = "",
) -> str:
    """The ``make distill``, or ``distill run``, that fits a cache: with its data, and without losses that its samples cannot teach.

    Args:
        cache: Its folder or address.
        pictures: How many of its samples have a picture, where that is known: without any, no attention is learnt.
        data: What the data was opened by, where that is known; None: as far as the plan tells it. A cache holds no
            paths, so files stand as placeholders.
        images: Folder of its images; with ``data`` only.
        recipe: The recipe that the cache was built by; empty: the one that the plan fits, if any. Its losses are those of
            the cache's signals.
    """
    recipe = recipe or recipe_of(plan)
    if data is None:
        data, images = _data_words(str(plan.data.get("name", "")))
    blind = (RowAttentionCodec.signal,) if pictures == 0 else ()
    missing = [signal for signal in DEFAULT_SIGNALS if signal not in plan.signals or signal in blind]
    options = [f"{phase}.losses.{signal}=0" for signal in missing for phase in _DISTILLING]
    if recipe and pictures != 0:
        no_projector = ["projector=null"] if plan.teacher.get("no_projector") else []
        options = [f"recipe={recipe}", *no_projector]
    words = {"DATA": data, "IMAGES": images, "CACHE": cache, "SET": " ".join(options)}
    by_variables = " ".join(f"{name}={quoted(value)}" for name, value in words.items() if value)
    words = {"--data": data, "--images": images, "--cache": cache, "--output": "FOLDER"}
    flags = [f"{name} {quoted(value)}" for name, value in words.items() if value]
    by_flags = " ".join([*flags, *(f"--set {quoted(option)}" for option in options)])
    return by_make(f"make distill STUDENT=mobilevlm {by_variables}", f"distill run --student mobilevlm {by_flags}")


def set_words(settings: Collection[str], *, variable: str = "SET") -> str:
    """How options are given: with ``make``, and on a command line."""
    flags = " ".join(f"--set {quoted(setting)}" for setting in settings)
    return by_make(f'{variable}="{" ".join(settings)}" with make, else {flags}', flags)


def _data_words(name: str) -> tuple[str, str]:
    """Data and folder of images by the name in a plan, which may say split and limit, and several of a merged cache."""
    bases = {part.partition("[")[0].partition("/")[0] for part in name.split(" + ")}
    base = bases.pop() if len(bases) == 1 else ""
    if base == DEFAULT_SHAPES:
        return "", ""
    if base == "easy-vqa" or _DRAWN.fullmatch(base):
        return base, ""
    return "FILE", "FOLDER"

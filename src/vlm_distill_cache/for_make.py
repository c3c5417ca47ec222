"""What the Makefile asks before it runs a stage: which of its variables are named by files of options, or by ``SET``."""

import os
import shlex
import sys
from pathlib import Path

from vlm_distill_cache.common.config import canonical_overrides, canonical_values, last_given, read_stage, read_yaml
from vlm_distill_cache.common.errors import ConfigError, DistillError
from vlm_distill_cache.common.printing import message
from vlm_distill_cache.common.recipes import split_recipe
from vlm_distill_cache.common.terminal.command_line import say
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage2_student.config import TrainConfig

_SHARED = {"DATA": "data", "IMAGES": "images", "TEACHER": "teacher", "CACHE": "cache"}


def main() -> None:
    """Print what `named` finds as assignments of a shell; an error is a line and exit code 2."""
    try:
        sys.stdout.write("".join(f"export {name}={shlex.quote(value)}\n" for name, value in named().items()))
    except DistillError as error:
        say(f"error: {message(str(error))}", err=True)
        raise SystemExit(2) from error


def named() -> dict[str, str]:
    """The variables that the options in ``CONFIG``, ``CACHE_CONFIG``, ``SET`` and ``CACHE_SET`` name, with their values.

    Variables that are in the environment were given, and are left out. ``BOTH_STAGES`` is 1 if ``CONFIG`` has the sections
    of both stages.

    Raises:
        ConfigError: For a file that cannot be read, or an option of both stages with two values.
    """
    config, of_cache = (Path(os.environ[name]) if os.environ.get(name) else None for name in ("CONFIG", "CACHE_CONFIG"))
    both = "teacher_cache" in read_yaml(config)
    found = {"BOTH_STAGES": "1"} if both else {}
    for file, stage, cls, options, variables in (
        (config if both else of_cache, "teacher_cache", BuildConfig, "CACHE_SET", {**_SHARED, "STORE": "store"}),
        (config, "distill", TrainConfig, "SET", {**_SHARED, "STUDENT": "student", "OUTPUT": "output"}),
    ):
        _, values, given = split_recipe(read_stage(file, stage), os.environ.get(options, "").split())
        values, given = canonical_values(cls, values, where=str(file)), canonical_overrides(cls, given)
        for name, option in variables.items():
            if both and name != "OUTPUT":  # which the stages read there themselves
                continue
            value = last_given(given, option) or str(values.get(option) or "")
            if value and name not in os.environ and found.setdefault(name, value) != value:
                raise ConfigError(
                    f"stage one has {option}={found[name]}, and stage two {option}={value}; give one value"
                )
    return found


if __name__ == "__main__":
    main()

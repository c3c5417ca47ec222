"""What tests run in a process of its own; a module, because such a process imports it by name."""

import os

from vlm_distill_cache.common.errors import ConfigError


def double(number: int) -> tuple[int, int]:
    return 2 * number, os.getpid()


def refuse(name: str) -> None:
    raise ConfigError(f"{name}: expected an even number")


def die(number: int) -> None:
    os.kill(os.getpid(), number)

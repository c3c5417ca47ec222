"""What processes of `test_parts.py` run; no torch, so that they start at once.

Run as a script it is a parent that prints its child's process id and waits for it.
"""

import multiprocessing
import sys
import time

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.planning.parts import Part, run_parts


def fail_or_wait(config, part):
    if part.rank == 1:
        raise ConfigError(f"disk of part {part} melted")
    time.sleep(300)


def print_children():
    sys.stdout.write("".join(f"{child.pid}\n" for child in multiprocessing.active_children()))
    sys.stdout.flush()


if __name__ == "__main__":
    run_parts(fail_or_wait, BuildConfig(device="cpu"), [Part()], print_children)

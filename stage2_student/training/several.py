"""torch's launcher without its tracebacks: what a training process says of itself is enough, and a stop is no failure."""

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from vlm_distill_cache.common.terminal.command_line import PARENT, end_with_parent, say


def launch() -> int:
    """Run torch's launcher on this process's arguments and return its exit code.

    It ends with the process that started it, even if that was killed, and its training processes with it.
    """
    logging.disable(logging.ERROR)
    end_with_parent()
    os.environ[PARENT] = str(os.getpid())  # of the training processes
    try:
        main()
    except SignalException:
        return 1
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"ended with exit code {failure.exitcode}; what it said stands above"
        if failure.exitcode < 0:
            how = f"was killed by {failure.signal_name()}; if nobody did that, memory ran out"
        folder = sys.argv[sys.argv.index("--output") + 1] if "--output" in sys.argv else "its folder"
        say(f"error: training process {rank} {how}. Its log and checkpoints are in {folder}", err=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(launch())

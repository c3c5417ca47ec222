"""torch's launcher without its tracebacks: what a training process says of itself is enough, and a stop is no failure."""

import logging
import sys

import click
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def launch() -> int:
    """Run torch's launcher on this process's arguments and return its exit code."""
    logging.disable(logging.ERROR)
    try:
        main()
    except SignalException:
        return 1
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            click.echo(
                f"error: training process {rank} was killed by {failure.signal_name()}; if nobody did that, memory ran out",
                err=True,
            )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(launch())

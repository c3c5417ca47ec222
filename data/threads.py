"""How many cores the arithmetic takes: all but one, which is left for reading and writing beside it."""

import os

import torch


def leave_one_core() -> int:
    """Let torch use all cores but one, unless ``OMP_NUM_THREADS`` says otherwise.

    Loading and encoding run on threads of their own. Where they compete with a full set of OpenMP threads, those
    spin at every barrier: a build on two busy cores was seen to take 20 times as long.

    Returns:
        The number of threads set.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    return torch.get_num_threads()

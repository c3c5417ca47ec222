"""How many threads compute, and how many read and encode beside them."""

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


def encoding_threads(device: torch.device) -> int:
    """How many threads read and encode ahead of a teacher.

    A picture of 640 x 480 pixels takes one thread about 20 ms, a teacher on a GPU takes a sample in less.

    Args:
        device: The teacher's; on a CPU its arithmetic has all cores but one.
    """
    return min(4, len(os.sched_getaffinity(0))) if device.type == "cuda" else 1

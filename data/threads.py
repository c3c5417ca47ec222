"""How many threads compute, and how many read and encode beside them."""

import os

import torch

FEW_SAMPLES = 512


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


def encoding_processes(wanted: int, device: torch.device, samples: int) -> int:
    """How many processes read and encode ahead of a teacher; 0: a thread does.

    A picture of 640 x 480 pixels takes one process about 20 ms, a teacher on a GPU takes a sample in less.

    Args:
        wanted: The number, of which there are no more than cores; or -1 for an automatic one.
        device: The teacher's; on a CPU its arithmetic has all cores but one.
        samples: Of the data set; for few of them no process is worth its start.
    """
    if wanted < 0:
        wanted = 0 if samples < FEW_SAMPLES else 4 if device.type == "cuda" else 1
    return min(wanted, len(os.sched_getaffinity(0)))

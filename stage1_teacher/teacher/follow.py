"""What a rank other than the leader does: it runs what the leader runs, and its results go nowhere."""

import torch

from vlm_distill_cache.common.errors import ProcessFailedError
from vlm_distill_cache.common.terminal.launch import Launch
from vlm_distill_cache.stage1_teacher.teacher.ranks import END, Ranks, join_launched, join_spawned
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher, find_device


def follow(ranks: Ranks) -> None:
    """Do what the leader tells until it tells to end.

    Raises:
        ProcessFailedError: If the leader is gone, or this rank failed alone.
    """
    teacher: Teacher | None = None
    while True:
        what, arguments = ranks.hear()
        if what == END:
            return
        try:
            if what == "open":
                teacher = None  # its memory is free before there is another one
                torch.set_num_threads(arguments.pop("threads"))
                teacher = Teacher(**arguments, device=str(ranks.device), tensor_parallel=ranks.size)
            else:
                getattr(teacher, what)(**arguments)
        except ProcessFailedError:
            raise
        except Exception:  # noqa: BLE001 - all ranks agree on it (`Ranks.together`), and the leader says what it was
            continue


def leads_ranks(launch: Launch, size: int, device: str) -> bool:
    """Whether this process leads a group of ranks, or is alone; one of a launch that does not takes part before this returns.

    Args:
        size: Of a group.
        device: This process's own.
    """
    if launch.size == 1 or size == 1:
        return True
    ranks = join_launched(launch, size, find_device(device))
    if not ranks.leads:
        follow(ranks)
    return ranks.leads


def follow_spawned(port: int, rank: int, size: int, device: str) -> None:
    """`follow`, in a process that the leader started."""
    follow(join_spawned(port, rank=rank, size=size, device=torch.device(device)))

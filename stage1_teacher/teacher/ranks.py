"""Several processes that hold one teacher, each a part of every layer: tensor parallelism.

Rank 0 leads: it does all that a lone process does, from reading data to writing shards. The others follow: they hold their
part of the weights, hear from rank 0 what to run, and take part in it; their results are the same and go nowhere. Shards,
leases, failed samples and batch sizes are the leader's alone, so that a group is one worker.

A pass waits for all ranks many times in every layer. One that fails alone, for want of memory, has left that order, and what it
sends next would be taken for another layer's; so all tell each other after each pass how it ended and how many such
sums they were part of. Where these are equal, the leader goes on as a lone process would (a batch that was too large
runs in halves); where they are not, all ranks end.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor

from vlm_distill_cache.common.errors import ConfigError, LaunchError, ProcessFailedError
from vlm_distill_cache.common.terminal.launch import Launch, meet, meeting_place
from vlm_distill_cache.common.terminal.processes import start_beside

logger = logging.getLogger(__name__)

PASS = timedelta(hours=2)  # most that one rank waits for another inside a pass, or until it has read its weights
IDLE = timedelta(days=365)  # a leader that waits for other workers tells its ranks nothing
ALONE = timedelta(minutes=1)  # that one which lacks memory waits for the others to lack it, too
_LEFT_S = 10.0  # for a leader to say itself that it lost a rank
_FINE, _MEMORY, _OTHER = range(3)
_FOLLOWERS = "vlm_distill_cache.stage1_teacher.teacher.follow", "follow_spawned"
END = "end"


@dataclass(eq=False)
class Ranks:
    """One of the ranks that hold a teacher together.

    Attributes:
        rank: Which, from 0, the leader.
        size: How many there are.
        device: This one's own.
        commands: Their group for what the leader tells, on the CPU.
        parts: Their group for parts of the model, once it is loaded.
        taken: Bytes that the last pass took of each rank's GPU at its peak; 0 on a CPU.
        free: Bytes that were free on each behind it.
    """

    rank: int
    size: int
    device: torch.device
    commands: dist.ProcessGroup
    parts: Any = None
    taken: tuple[int, ...] = ()
    free: tuple[int, ...] = ()
    _inside: bool = field(default=False, repr=False)

    @property
    def leads(self) -> bool:
        """Whether the others do what this one tells."""
        return self.rank == 0

    def holds(self, model: nn.Module) -> None:
        """Say which model the ranks share, once it is loaded."""
        self.parts = next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh.get_group()

    def tell(self, what: str, **arguments: Any) -> None:
        """Tell the followers what to do next; of a follower, which does it because it was told, nothing."""
        if self.leads:
            self._broadcast([(what, arguments)])

    def hear(self) -> tuple[str, dict[str, Any]]:
        """Wait for what the leader tells."""
        heard: list[Any] = [None]
        self._broadcast(heard)
        what, arguments = heard[0]
        return what, arguments

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks of what each has, float, equal shapes; the same on all."""
        values = values.contiguous()
        dist.all_reduce(values, group=self.parts)
        return values / self.size

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks run; behind it they agree on how it ended.

        Raises:
            torch.OutOfMemoryError: On all, if memory did not suffice on one, and they may go on.
            ProcessFailedError: If they may not: one failed alone, or is gone.
        """
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._inside, fault = True, None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the others wait for this one
            fault = error
        taken = torch.cuda.max_memory_allocated(self.device) - before if on_gpu else 0
        free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else 0
        self._agree(fault, taken, free)
        self._inside = False

    def _agree(self, fault: Exception | None, taken: int, free: int) -> None:
        """Tell each other how a pass ended; returns where it ended well on all."""
        kind = _FINE if fault is None else _MEMORY if isinstance(fault, torch.OutOfMemoryError) else _OTHER
        passed = 0 if self.parts is None else self.parts._get_sequence_number_for_group()
        mine = torch.tensor([kind, passed, taken, free])
        told = [torch.empty_like(mine) for _ in range(self.size)]
        with self._explained(fault):
            work = dist.all_gather(told, mine, group=self.commands, async_op=True)
            work.wait(ALONE if kind == _MEMORY else IDLE)
        kinds, counts, self.taken, self.free = (tuple(row) for row in torch.stack(told, dim=1).tolist())
        if len({*counts}) > 1:
            lacked = [str(rank) for rank, found in enumerate(kinds) if found == _MEMORY]
            why = (
                f"memory did not suffice on rank {' and '.join(lacked)}"
                if lacked
                else "a pass ended, on some otherwise"
            )
            raise ProcessFailedError(
                f"rank {self.rank} of {self.size}: {why}, at another place than on the others, so none can go on. Finished "
                "shards are kept; end what else runs on the devices, then run the same command again, or begin a new cache "
                "with a smaller batch_size"
            ) from fault
        if kind == _OTHER and not self.leads and kinds[0] != _OTHER:
            logger.error("rank %d of %d: %s: %s", self.rank, self.size, type(fault).__name__, fault)
        if fault is not None:
            self._inside = False
            raise fault
        if _MEMORY in kinds:
            self._inside = False
            raise torch.OutOfMemoryError(f"out of memory on rank {kinds.index(_MEMORY)} of {self.size}")
        if _OTHER in kinds and self.leads:
            raise ProcessFailedError(
                f"rank {kinds.index(_OTHER)} of {self.size} failed where this one did not; what it said stands beside this line"
            )

    def _broadcast(self, objects: list[Any]) -> None:
        with self._explained(None):
            dist.broadcast_object_list(objects, src=0, group=self.commands)

    @contextmanager
    def _explained(self, fault: Exception | None) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's errors of a connection
            why = "lost the others: what they said stands beside this line"
            if isinstance(fault, torch.OutOfMemoryError):
                why = "lacks memory, and the others do not"
            raise ProcessFailedError(
                f"rank {self.rank} of {self.size} {why}. Finished shards are kept, and the same command goes on from there"
            ) from (fault or error)

    def leave(self) -> None:
        """Let the followers end, where they wait to be told something."""
        if self.leads and not self._inside:
            with suppress(ProcessFailedError):
                self.tell(END)


_joined: list[Ranks] = []  # a process is of one group as long as it lives


def join(size: int, device: torch.device) -> Ranks:
    """The group that this process is of; else it becomes the leader of one, whose followers it starts.

    Args:
        size: Ranks, this one included.
        device: Of rank 0; on GPUs the others have the next ones.

    Raises:
        ConfigError: If it is of a group of another size, or there are not so many GPUs.
    """
    if not _joined:
        if dist.is_initialized():
            raise ConfigError(
                f"tensor_parallel={size}: this Python process is one of several already (torch.distributed); build the cache in "
                "a process of its own"
            )
        refuse_devices(size, device)
        store = TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        devices = [
            torch.device("cuda", (device.index or 0) + rank) if device.type == "cuda" else device
            for rank in range(size)
        ]
        jobs = [(f"rank {rank} of {size}", (store.port, rank, size, str(devices[rank]))) for rank in range(1, size)]
        close = start_beside(*_FOLLOWERS, jobs, on_end=_lost)
        _form(store, rank=0, size=size, device=devices[0], close=close)
    [ranks] = _joined
    if ranks.size != size:
        raise ConfigError(
            f"tensor_parallel={size}: this process leads {ranks.size} ranks; run the command in a process of its own"
        )
    return ranks


def following() -> Ranks | None:
    """The group that this process is a follower in; None: it is in none, or leads one."""
    return next((ranks for ranks in _joined if not ranks.leads), None)


def refuse_devices(size: int, device: torch.device) -> None:
    """Refuse a device that the model library would not divide a model over, or one with too few beside it.

    Raises:
        ConfigError: Naming both.
    """
    here = torch.accelerator.current_accelerator()
    kind = "cpu" if here is None else here.type
    if device.type != kind:
        raise ConfigError(
            f"tensor_parallel={size} with device={device}: a teacher is divided over devices of the kind {kind} on this machine; "
            "leave device out"
        )
    count = torch.cuda.device_count() if kind == "cuda" else size
    if (device.index or 0) + size > count:
        raise ConfigError(
            f"tensor_parallel={size} with device={device}: each rank has a GPU of its own, and {count} are here; set a smaller one"
        )


def join_spawned(port: int, *, rank: int, size: int, device: torch.device) -> Ranks:
    """Join the leader that started this process."""
    store = TCPStore("127.0.0.1", port, size, is_master=False, wait_for_workers=False)
    return _form(store, rank=rank, size=size, device=device)


def join_launched(launch: Launch, size: int, device: torch.device) -> Ranks:
    """Join the group of this process where a launcher started all of them: so many successive ones are a group.

    Raises:
        LaunchError: If the number of processes is no multiple of it.
        ConfigError: If they do not meet.
    """
    if launch.size % size:
        raise LaunchError(
            f"tensor_parallel={size}: {launch.launcher} started {launch.size} processes, which is no multiple of it; start "
            "so many ranks for each worker"
        )
    meet(launch)
    store = PrefixStore(f"vlm-distill-ranks/{launch.rank // size}", meeting_place())
    return _form(store, rank=launch.rank % size, size=size, device=device)


def _form(
    store: Store, *, rank: int, size: int, device: torch.device, close: Callable[[], None] = lambda: None
) -> Ranks:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PASS)
    ranks = Ranks(rank, size, device, dist.new_group(backend="gloo", timeout=IDLE))
    _joined.append(ranks)

    def end() -> None:
        ranks.leave()
        close()

    Finalize(None, end, exitpriority=10)  # before what this process started is ended
    return ranks


def _lost(said: str) -> None:
    """End this process, because one that it started has ended: it may be waiting for that one in code that knows no end."""
    time.sleep(_LEFT_S)
    logger.error(
        "%s\nThe teacher's other ranks were stopped; the same command goes on from the last finished shard", said
    )
    os._exit(1)


@contextmanager
def bound_by_library(device: torch.device) -> Iterator[None]:
    """Let the model library place this rank's part on its device: it reads the number off a launcher's variable."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        os.environ.pop("LOCAL_RANK")
        if before is not None:
            os.environ["LOCAL_RANK"] = before

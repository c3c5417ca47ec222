"""A student divided among processes by torch's FSDP2: each keeps its share of weights, gradients and optimizer averages.

Every decoder layer is gathered when it runs, forwards and backwards, and given back; all else (embeddings, output projection,
projector, vision tower) is gathered once a pass. What is divided is a copy. The student itself stays whole in main memory,
where adapters are merged, students scored and files written as without sharding; `gather_into` brings it up to date.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm_distill_cache.common.errors import ConfigError, ModelError


def check_shardable(student: Any) -> None:
    """Raise a ConfigError if a student cannot be divided."""
    try:
        layers = getattr(student.language_model, "layers", None)
    except ModelError:  # of a family that is not in the table
        layers = None
    scalars = [name for name, value in student.named_parameters() if value.ndim == 0]
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            "sharding=fsdp2: where this student keeps its decoder layers is not known (data/families/table.py), so it cannot "
            "be divided; leave sharding out"
        )
    if scalars:
        raise ConfigError(
            f"sharding=fsdp2: {scalars[0]} is a single number, which FSDP2 cannot divide; leave sharding out"
        )


def shard_student(student: Any, *, device: torch.device, processes: int, dtype: torch.dtype) -> Any:
    """Divide a copy of a student, whose weights are on the CPU, among all processes; each calls this.

    Args:
        student: Float32; what of it is trained is marked by ``requires_grad``. It keeps its own weights.
        device: Where this process computes.
        processes: How many there are.
        dtype: Of the arithmetic: weights are kept, and gradients added, in float32 and gathered in this.

    Returns:
        The copy; its parameters are `DTensor`s, of the same names.
    """
    # Parameters share the student's memory until they are cut, layer by layer: no device ever holds all of them.
    own = {id(value): nn.Parameter(value.detach().contiguous(), value.requires_grad) for value in student.parameters()}
    sharded = copy.deepcopy(student, dict(own))
    mesh = init_device_mesh(device.type, (processes,))
    half = dtype != torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    for layer in sharded.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    return sharded


@torch.no_grad()
def gather_into(student: Any, sharded: Any) -> None:
    """Copy what was trained of a divided student back into the whole one; every process calls this."""
    own = dict(student.named_parameters())
    for name, value in sharded.named_parameters():
        if value.requires_grad:
            own[name].copy_(value.full_tensor())


def as_share(value: Tensor, of: Tensor) -> Tensor:
    """This process's share of a whole tensor, divided as a parameter is; the tensor itself where that is whole."""
    if isinstance(value, DTensor) or not isinstance(of, DTensor) or value.shape != of.shape:
        return value
    return distribute_tensor(value.to(of.device), of.device_mesh, of.placements, src_data_rank=None)


def whole_number(value: Tensor) -> Tensor:
    """A scalar that all processes have a part of, such as a norm over shares, as each knows it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def all_reached(model: Any) -> Iterator[None]:
    """In the block embedded tokens depend on all that is trained and gathered, if only by nothing (0 times it).

    A pass without pictures does not reach the projector: its process would exchange fewer gradients than others, and
    all would wait for ever.
    """

    def add_nothing(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        # Layers that are not gathered now are reached by text, too.
        gathered = [value for value in model.parameters() if value.requires_grad and not isinstance(value, DTensor)]
        return output + sum((value.sum() * 0.0 for value in gathered), output.new_zeros(())).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add_nothing)
    try:
        yield
    finally:
        hook.remove()


def is_sharded(model: Any) -> bool:
    """Whether a model is a copy that `shard_student` made."""
    return isinstance(model, FSDPModule)

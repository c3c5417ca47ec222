"""The shares of a divided student in a checkpoint, written and read by torch's distributed checkpoint as safetensors.

Each process writes what it has; any number of processes reads it, each what it needs, so that a run goes on with another
number of them or with one. In the files, ``values/NAME`` is a parameter and ``averages/INDEX/KEY`` what the optimizer keeps
of the one of that index in its groups. Nothing is unpickled: torch's usual format would be.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vlm_distill_cache.common.errors import CacheFormatError, NoRoomError
from vlm_distill_cache.common.files.disk import AGAIN

SUFFIX = ".safetensors"
_VALUES, _AVERAGES = "values/", "averages/"


def write_shares(folder: Path, values: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Write this process's shares of parameters and averages into a folder that is there; all processes call it.

    Raises:
        NoRoomError: If one of them cannot write, on all of them.
    """
    shares: dict[str, Any] = {f"{_VALUES}{name}": value for name, value in values.items()}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, DTensor):
                shares[f"{_AVERAGES}{index}/{key}"] = value
    try:
        save(shares, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise NoRoomError(
            f"{folder.parent}: process {rank} cannot write its share of a checkpoint, the disk may be full or not shared by all "
            f"processes ({cause}); make room, or give an --output that all can write to, then {AGAIN}"
        ) from error


def plain_state(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state without its shares: how many steps each parameter has taken, and the settings."""
    state = optimizer.state_dict()
    kept = {
        index: {key: value for key, value in averages.items() if not isinstance(value, DTensor)}
        for index, averages in state["state"].items()
    }
    return {"state": kept, "param_groups": state["param_groups"]}


def read_values(folder: Path) -> dict[str, Tensor]:
    """All parameters in a folder, whole."""
    table = _table(folder, _VALUES)
    wanted = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in table.items()}
    _read(folder, wanted)
    return {name.removeprefix(_VALUES): value for name, value in wanted.items()}


def read_averages(
    folder: Path, state: Mapping[int, Mapping[str, Any]], optimizer: Optimizer
) -> dict[int, dict[str, Any]]:
    """An optimizer's averages by index, beside what `plain_state` kept: of divided parameters this process's shares.

    Raises:
        CacheFormatError: If the folder holds those of other parameters.
    """
    parameters, found = _parameters(optimizer), {index: dict(kept) for index, kept in state.items()}
    wanted: dict[str, Any] = {}
    for name, entry in _table(folder, _AVERAGES).items():
        index, _, key = name.removeprefix(_AVERAGES).partition("/")
        if not index.isdecimal() or int(index) not in found or parameters[int(index)].shape != entry.size:
            raise CacheFormatError(f"{folder}: {name} {[*entry.size]} is of no parameter that is trained")
        wanted[name] = found[int(index)][key] = torch.zeros_like(parameters[int(index)], requires_grad=False)
    _read(folder, wanted)
    return found


def _parameters(optimizer: Optimizer) -> Sequence[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _table(folder: Path, prefix: str) -> dict[str, Any]:
    """Shape and dtype of what is there, as the library describes tensors."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry for name, entry in sorted(found.items()) if name.startswith(prefix)}


def _read(folder: Path, wanted: dict[str, Any]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads for itself
            load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        raise CacheFormatError(f"{folder}: {next(iter(error.failures.values()))[0]}") from error

"""A device that does not exist: its tensors hold values on the CPU, say that they lie elsewhere, and refuse to mix.

Code that forgets to move a tensor works on a CPU and fails on a GPU. Inside `other_device` a forgotten move fails here,
too: operations on tensors of `ELSEWHERE` and on those of the CPU at once raise `MixedDevicesError`, as CUDA's kernels do
(numbers without dimensions may mix, copies may cross). It also notes which operations would make the host wait for a GPU.

The name is that of a device type which autograd runs without a backend behind it.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("lazy", 0)
ROOT = Path(__file__).resolve().parent.parent
_CROSSES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
# Operations whose result, or its size, the host must know.
_WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
)


class MixedDevicesError(RuntimeError):
    """An operation got tensors of two devices."""


class _There(Tensor):
    """A tensor of `ELSEWHERE`; `here` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "_There":
        made: _There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device=ELSEWHERE, requires_grad=False,
        )  # fmt: skip
        made.here = here
        return made

    def __init__(self, here: Tensor) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"There({self.here!r})"

    def tolist(self) -> Any:
        """As of every tensor, which torch does not offer to subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [leaf for leaf in leaves if isinstance(leaf, _There)]
    mixed = [leaf for leaf in leaves if not isinstance(leaf, _There) and leaf.dim() > 0]
    if there and mixed and func not in _CROSSES:
        shapes = ", ".join(str([*leaf.shape]) for leaf in mixed)
        raise MixedDevicesError(f"{func}: expected all tensors on {ELSEWHERE}, but {shapes} lie on the CPU")
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    goes = bool(there) if device is None else torch.device(device).type == ELSEWHERE.type
    if func is torch.ops.aten.copy_.default:
        goes = isinstance(args[0], _There)
    of = {id(leaf.here): leaf for leaf in there}
    plain = tree_map(lambda leaf: leaf.here if isinstance(leaf, _There) else leaf, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if not goes:
        return found

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return of[id(leaf)] if id(leaf) in of else _There(leaf)  # in place: the same tensor as before

    return tree_map(put, found)


class OtherDevice(TorchDispatchMode):
    """Runs what is made on `ELSEWHERE`, too, and notes where the host waits.

    Attributes:
        waits: Of each wait the operation, and the innermost line of this project that led to it, ``path:line``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            self.waits.append((func.overloadpacket.__name__, _line()))
        return _run(func, args, kwargs)


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if not any(isinstance(leaf, _There) for leaf in tree_leaves((args, kwargs))):
        return False
    name = func.overloadpacket.__name__
    if func is torch.ops.aten._to_copy.default:
        device = kwargs.get("device")
        return device is not None and torch.device(device).type == "cpu" and not kwargs.get("non_blocking", False)
    if func is torch.ops.aten.copy_.default:
        return not isinstance(args[0], _There)
    if name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
        return any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1]))
    return name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)


def _line() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(ROOT) and not {".venv", "tests"} & set(path.relative_to(ROOT).parts):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere"


@contextmanager
def other_device() -> Iterator[OtherDevice]:
    """In the block tensors may be made on and moved to `ELSEWHERE`; autocast is off there.

    `torch.inference_mode` is `torch.no_grad` meanwhile: tensors that wrap others cannot be made in it.
    """
    asked = torch.is_autocast_enabled

    def is_autocast_enabled(kind: str | None = None) -> bool:
        return False if kind == ELSEWHERE.type else asked(*([] if kind is None else [kind]))

    def enter(mode: Any) -> None:
        mode.instead = torch.no_grad()
        mode.instead.__enter__()

    def leave(mode: Any, *error: Any) -> None:
        mode.instead.__exit__(*error)

    with (
        patch.object(torch, "is_autocast_enabled", is_autocast_enabled),
        patch.object(torch.inference_mode, "__enter__", enter),
        patch.object(torch.inference_mode, "__exit__", leave),
        OtherDevice() as device,
    ):
        yield device

"""Bytes of the tensors alive while a block runs: what an allocator would be asked for, on any device, even `meta`."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations return, until they are freed; what existed before is not counted.

    Temporaries inside one operation of the library are not seen (`logsumexp` copies its input): that
    flatters whoever uses such operations on large tensors.
    """

    def __init__(self, *before: Tensor) -> None:
        """Begin at 0; ``before`` are tensors that are there."""
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in before}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.now += size
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size

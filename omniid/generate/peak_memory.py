"""How much memory a computation needs beside its inputs, found on the meta device, where nothing is computed."""

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors that are alive at once while `function` runs, those that it makes itself.

    Attention counts with its output only, as its flash form needs; workspaces of matrix products and convolutions are not
    known here.
    """
    with torch.no_grad(), _FlashAttention(), _LiveBytes() as live:
        function()
    return live.peak


class _FlashAttention(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return _flash(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _flash(query: Tensor, key: Tensor, value: Tensor, *unused, **unused_too) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


class _LiveBytes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Views and results in place share a storage with an argument, which is counted, or was there before.
        before = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            key = storage._cdata
            if key not in before and key not in self._seen:
                self._seen.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._end, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _end(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _storages(values: object) -> list[torch.UntypedStorage]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]

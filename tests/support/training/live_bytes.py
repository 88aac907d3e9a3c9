"""`LiveBytes`: the bytes of all tensors that this thread has made and that are still there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Counts storages, each once, from when an op returns a tensor on it until nothing holds it. `now`, and the most
    that there was since `most` was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary()
        self._counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(found):
            if self._counts and storage.data_ptr() not in given and storage not in self._known:
                self._known[storage] = True
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return found

    @contextmanager
    def of_others(self) -> Iterator[None]:
        """Leaves tensors made within uncounted: they are another rank's."""
        self._counts = False
        yield
        self._counts = True

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes


def _storages(values: Any) -> Iterator[Any]:
    """Those of all tensors among `values`. A sparse one has none: its rows, and where they lie, are tensors before it
    is made of them."""
    for x in tree_leaves(values):
        if isinstance(x, torch.Tensor) and not x.is_sparse:
            yield x.untyped_storage()

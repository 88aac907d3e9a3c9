"""`CacheTable`: the caches of one rank, by the number that each has on all ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from autodist_fx.runtime.cache.kv_cache import SplitCache


class CacheTable:
    """Hands out caches that `make`, a method of a model, makes. Keeps neither these nor the model alive."""

    def __init__(self, make: Callable[[], SplitCache]) -> None:
        self._make: weakref.WeakMethod[Callable[[], SplitCache]] = weakref.WeakMethod(make)
        self._caches: weakref.WeakValueDictionary[int, SplitCache] = weakref.WeakValueDictionary()
        self._highest = 0

    def new(self) -> SplitCache:
        """Return an empty cache with the next number."""
        return self.numbered(self._highest + 1)

    def numbered(self, number: int) -> SplitCache:
        """Return the cache of that number; an empty one at first."""
        cache = self._caches.get(number)
        if cache is None:
            make = self._make()
            assert make is not None, "the model that these caches belong to is gone"
            cache = make()
            cache.number = number
            self._caches[number] = cache
            self._highest = max(self._highest, number)
        return cache

    def get(self, number: int) -> SplitCache | None:
        """Return the cache of that number, where somebody holds it; else None."""
        return self._caches.get(number)

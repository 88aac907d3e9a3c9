"""`Turns`: threads of one rank that run one at a time, and hand the turn on in a circle.

transformers' `generate` is one loop for one batch. To have several batches in flight, each runs in a thread of its own.
A thread hands the turn on where it has announced something to the other ranks and not done it yet:

    A: announce A1 | B: announce B1 | A: run A1, choose tokens, announce A2 | B: run B1, choose, announce B2 | ...

So what this rank runs comes in the order in which it was announced, which is the order on all other ranks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class _Stopped(BaseException):
    """Ends a thread whose turn does not come any more, since another one has failed."""


class _Slot:
    """One thread, and the semaphore that it waits at for its turn."""

    def __init__(self, run: Callable[[_Slot], None], number: int) -> None:
        self.turn = threading.Semaphore(0)
        self.thread = threading.Thread(target=run, args=(self,), name=f"group {number}", daemon=True)


class Turns(Generic[T]):
    """Runs jobs in up to `most` threads; a thread whose job is done takes the next that waits. `save` and `restore`
    keep what belongs to the thread whose turn it is, and is shared otherwise."""

    def __init__(self, most: int, save: Callable[[], Any], restore: Callable[[Any], None]) -> None:
        self._most, self._save, self._restore = most, save, restore
        self._circle: deque[_Slot] = deque()  # the one whose turn it is comes first
        self._waiting: Iterator[tuple[int, Callable[[], T]]] = iter(())
        self._results: dict[int, T] = {}
        self._error: BaseException | None = None
        self._stopping, self._over = False, threading.Event()

    def run(self, jobs: Iterable[Callable[[], T]]) -> list[T]:
        """Return what the jobs return, in their order; called in a thread that waits meanwhile. Raises what the first
        job that fails raises, when all threads have ended."""
        todo = list(jobs)
        self._waiting = iter(enumerate(todo))
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # both belong to a thread

        def run(slot: _Slot) -> None:
            slot.turn.acquire()
            with torch.inference_mode(modes[1]), torch.set_grad_enabled(modes[0]):
                self._run_jobs(slot)

        self._circle.extend(_Slot(run, number) for number in range(min(self._most, len(todo))))
        slots = list(self._circle)
        if not slots:
            return []
        for slot in slots:
            slot.thread.start()
        slots[0].turn.release()
        try:
            self._over.wait()
        except BaseException:  # Ctrl-C, or an alarm's: whoever breaks off the call ends what a thread still waits for
            self._stopping = True
            raise
        for slot in slots:
            slot.thread.join()
        if self._error is not None:
            raise self._error
        return [self._results[number] for number in range(len(todo))]

    def hand_on(self) -> None:
        """Let the others have their turns; return when this thread's comes again. Called by the one whose turn it is.
        """
        if len(self._circle) == 1 and not self._stopping:
            return
        mine, state = self._circle[0], self._save()
        self._circle.rotate(-1)
        self._circle[0].turn.release()
        mine.turn.acquire()
        if self._stopping:
            raise _Stopped
        self._restore(state)

    def _run_jobs(self, slot: _Slot) -> None:
        try:
            while not self._stopping and (job := next(self._waiting, None)) is not None:
                self._results[job[0]] = job[1]()
        except _Stopped:
            pass
        except BaseException as error:
            self._error, self._stopping = self._error or error, True
        finally:
            self._circle.remove(slot)
            if self._circle:
                self._circle[0].turn.release()
            else:
                self._over.set()

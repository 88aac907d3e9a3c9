"""`Announcements`: how far what the driver announces may be ahead of what it has run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from autodist_fx.runtime.microbatches.bounded_sends import SendingCommunicator


class Announcements(Protocol):
    """The duties around each announcement of the driver."""

    def begin(self) -> None:
        """Let go of what earlier announcements sent; to be called before one."""

    def end(self) -> None:
        """Return when the driver is to do what it has announced; to be called behind an announcement."""


class OneByOne:
    """Announcements each of which is done before the next is made."""

    def __init__(self, finish_sends: Callable[[], None]) -> None:
        self.begin = finish_sends

    def end(self) -> None:
        """Return at once."""


class InTurns:
    """Announcements of several groups of rows, which hand their turn on in between (turns.py).

    A rank hears an announcement when it has done all that was announced before. As long as the driver has not begun
    with something, others may wait for the driver in it instead of hearing what comes next. So only what was sent up to
    the last thing that the driver has begun is waited for. `sent()` counts all that was ever sent with announcements,
    which are all that a driver sends while it generates.
    """

    def __init__(
        self, communicator: SendingCommunicator, sent: Callable[[], int], hand_on: Callable[[], None]
    ) -> None:
        self._communicator, self._sent, self._hand_on = communicator, sent, hand_on
        self._ahead: deque[int] = deque()  # what was sent up to each announcement that is yet to be run, in order
        self._begun = sent()

    def begin(self) -> None:
        """Let go of what was sent up to the last announcement that the driver has begun to run."""
        left = self._sent() - self._begun
        self._communicator.finish_sends(keep=min(left, self._communicator.unfinished_sends))

    def end(self) -> None:
        """Hand the turn on; return when all that was announced before has been run."""
        self._ahead.append(self._sent())
        self._hand_on()
        self._begun = self._ahead.popleft()

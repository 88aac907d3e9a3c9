"""`BoundedSends`: lets a rank run ahead of those that it sends to, by so much and no more."""

from __future__ import annotations

from typing import Protocol


class SendingCommunicator(Protocol):
    """A communicator whose sends return before the bytes have left."""

    @property
    def unfinished_sends(self) -> int:
        """Return the number of sends that are not known to be received."""

    def finish_sends(self, *, keep: int = 0) -> None:
        """Let go of what was sent but for the last `keep` sends, waiting for it where needed."""


class BoundedSends:
    """The sends of a rank that runs one action after another (a microbatch, a step of a group of rows).

    What an action sent is let go of before the action after the next: meanwhile it may be on its way, and the tensors
    of two actions at most are kept for it. passes/verify/schedule.py proves that ranks which wait so do not wait for
    each other for ever.
    """

    def __init__(self, communicator: SendingCommunicator) -> None:
        self._communicator = communicator
        self._before = 0  # unfinished sends when the last action began

    def begin_action(self) -> None:
        """Wait for what the action before the last has sent; to be called before each action."""
        kept = self._communicator.unfinished_sends - self._before
        self._communicator.finish_sends(keep=max(0, kept))
        self._before = self._communicator.unfinished_sends

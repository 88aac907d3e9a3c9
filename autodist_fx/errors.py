"""Errors of the torch and transformers side. Every message names the thing that is wrong and the way out."""

from cost_model.errors import AutodistError, ScheduleError

__all__ = [
    "AutodistError",
    "CheckpointError",
    "CommunicationError",
    "DeadlockError",
    "DisagreementError",
    "NoSuchMemberError",
    "OutOfTableError",
    "RemoteRankError",
    "RuntimeSetupError",
    "ScheduleError",
    "TracingError",
]


class TracingError(AutodistError):
    """A model could not be turned into a graph; the message names the model class and the line of its source."""


class CheckpointError(AutodistError):
    """A checkpoint cannot be found or read, or is not of this model."""


class RuntimeSetupError(AutodistError):
    """The ranks cannot be started or joined as asked: world size, devices, addresses."""


class DisagreementError(RuntimeSetupError):
    """Ranks were asked for different things; the message says which rank for what."""


class CommunicationError(AutodistError):
    """Two ranks' messages do not fit together."""


class DeadlockError(CommunicationError):
    """Every rank waits for another one; the message says for what."""


class NoSuchMemberError(AutodistError, AttributeError):
    """A member of transformers' models that a rank's share of one does not have."""


class OutOfTableError(AutodistError, IndexError):
    """An input holds an id (of a token, a position, a class) that the table which it is looked up in does not have."""


class RemoteRankError(AutodistError):
    """Another rank raised an error of a class that this one does not know; the message is that error's."""

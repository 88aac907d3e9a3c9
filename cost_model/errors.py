"""Errors that users can act on: every message names the thing that is wrong and the way out."""


class AutodistError(Exception):
    """Base class of all errors that autodist_fx raises on purpose."""


class MeshError(AutodistError):
    """The mesh is no grid of ranks, or the model cannot be split over it."""


class PlanError(AutodistError):
    """A partition plan is malformed, of another version, or of another model."""


class NoPlanFits(AutodistError):
    """No plan keeps within the memory limits."""


class AmbiguousLengthsError(AutodistError):
    """Two sizes in a graph are equal at both lengths that it was looked at with, and not at others."""


class ScheduleError(AutodistError):
    """A pipeline schedule does not exist, does not take these ranks, stages and microbatches, or is not complete."""


class VerificationError(AutodistError):
    """A rank program is wrong; the message names the node."""


def reason_text(error: Exception) -> str:
    """Returns why a file could not be read or written, without the path, which the caller's message names already."""
    return getattr(error, "strerror", None) or str(error)

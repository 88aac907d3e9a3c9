"""Errors that a user can act on. Every message names the thing that is wrong and the way out."""


class AutodistError(Exception):
    """Base class of everything autodist_fx raises on purpose."""


class MeshError(AutodistError):
    """The mesh makes no sense, or the model cannot be laid out on it."""


class PlanError(AutodistError):
    """A partition plan is malformed, of another version, or of another model."""


class NoPlanFits(AutodistError):
    """No layout fits the memory limit."""


class VerificationError(AutodistError):
    """A rank program is wrong; the message names the node."""


def reason_text(error: Exception) -> str:
    """Why a file could not be read or written, without the path that the message names already."""
    return getattr(error, "strerror", None) or str(error)

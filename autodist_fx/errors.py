"""Errors of the torch and transformers side. Every message names the thing that is wrong and the way out."""

from cost_model.errors import AutodistError

__all__ = ["AutodistError", "TracingError"]


class TracingError(AutodistError):
    """A model could not be turned into a graph; the message names the model class and the line of its source."""

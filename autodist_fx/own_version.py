"""Says which version of autodist_fx this is, installed or not."""

from __future__ import annotations

import importlib.metadata


def own_version() -> str:
    """Return the installed distribution's version; "not installed" where the package is only on Python's path."""
    try:
        return importlib.metadata.version("autodist-fx")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

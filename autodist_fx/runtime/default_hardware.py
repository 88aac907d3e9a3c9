"""Chooses the hardware that plans are predicted for where nobody names any."""

from __future__ import annotations

import torch


def default_hardware() -> str:
    """Return the name of a preset: "generic" where CUDA is there, "cpu-gloo" where not."""
    return "generic" if torch.cuda.is_available() else "cpu-gloo"

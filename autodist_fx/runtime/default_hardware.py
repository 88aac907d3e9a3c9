"""What plans are predicted for where nobody names any hardware."""

from __future__ import annotations

import torch


def default_hardware() -> str:
    """The name of a preset: "generic" where CUDA is there, "cpu-gloo" where not."""
    return "generic" if torch.cuda.is_available() else "cpu-gloo"

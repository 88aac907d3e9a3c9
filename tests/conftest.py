"""Shared by all tests: one thread each, the same random numbers each time, and helpers that every folder can import."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# pytest puts this folder on sys.path (so that tests import tiny_models), and it has folders named like our packages.
# Python takes those for packages only where it finds no real one: so let it find the real ones, however it was started.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

os.environ["ADX_CACHE"] = "0"  # a test that wants splits kept says where

# No deadline: two test processes share two cores with whatever else runs. Derandomized: a red test is red again.
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("tests")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)

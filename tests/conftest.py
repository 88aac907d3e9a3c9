"""Sets up every test process: one thread, the same random numbers for each test, no cache of splits."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

os.environ["ADX_CACHE"] = "0"  # a test that wants splits kept says where

# No deadline: two test processes share two cores with whatever else runs. Derandomized: a red test is red again.
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("tests")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)

"""Sets up every test process: one thread, the same random numbers for each test, no cache of splits.

Of tests that are marked `one_for_each("family")`, one case for each family is run, on a mesh drawn by the case's name;
`pytest --every-case`, which `make coverage` calls, and a case named on the command line run them all.
"""

from __future__ import annotations

import os
import zlib

import pytest
import torch
from hypothesis import settings

os.environ["ADX_CACHE"] = "0"  # a test that wants splits kept says where

# No deadline: two test processes share two cores with whatever else runs. Derandomized: a red test is red again.
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("tests")

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-case", action="store_true", help="all cases of tests that are marked one_for_each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--every-case") or any("::" in argument for argument in config.args):
        return
    drawn: dict[tuple[object, ...], pytest.Item] = {}
    for item in items:
        key = _group(item)
        if key not in drawn or _draw(item) < _draw(drawn[key]):
            drawn[key] = item
    kept = set(drawn.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _group(item: pytest.Item) -> tuple[object, ...]:
    """Returns the group of which one case is drawn: an unmarked test is alone in its own."""
    marker = item.get_closest_marker("one_for_each")
    if marker is None or not isinstance(item, pytest.Function):
        return (item.nodeid,)
    return (item.module, item.originalname, *(str(item.callspec.params[name]) for name in marker.args))


def _draw(item: pytest.Item) -> int:
    return zlib.crc32(item.nodeid.encode())


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)

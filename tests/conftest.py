"""Sets up every test process: one thread, the same random numbers for each test, no cache of splits, a preset's plans.

Not every case of every test is run each time. One case for each family is run of a test that is marked
`one_for_each("family")`, three of one that is marked `drawn(3)`, drawn by the cases' names; with `--one-case`, which
CI adds for the older of the two versions of transformers, one case of any test. `--every-case`, which `make coverage`
adds, and a case named on the command line run them all.
"""

from __future__ import annotations

import gc
import os
import zlib

import pytest
import torch
from hypothesis import settings

os.environ["ADX_CACHE"] = "0"  # a test that wants splits kept says where
os.environ["ADX_HARDWARE"] = "cpu-gloo"  # and not what this machine was measured to be

# No deadline: two test processes share two cores with whatever else runs. Derandomized: a red test is red again.
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("tests")

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-case", action="store_true", help="all cases of tests marked one_for_each or drawn")
    parser.addoption("--one-case", action="store_true", help="one case of each test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--every-case") or any("::" in argument for argument in config.args):
        return
    groups: dict[tuple[object, ...], list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(_group(item, config.getoption("--one-case")), []).append(item)
    kept = {item for group in groups.values() for item in sorted(group, key=_draw)[: _count(group[0])]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish() -> None:
    """Leaves what is there by now, torch and transformers and all tests, out of every later search for garbage."""
    gc.collect()
    gc.freeze()


def _group(item: pytest.Item, one_case: bool) -> tuple[object, ...]:
    """Returns the group of which cases are drawn: a test that nothing says so of is alone in its own."""
    marker = item.get_closest_marker("one_for_each")
    if not isinstance(item, pytest.Function) or not (one_case or marker or item.get_closest_marker("drawn")):
        return (item.nodeid,)
    names = () if one_case or marker is None else marker.args
    return (item.module, item.originalname, *(str(item.callspec.params[name]) for name in names))


def _count(item: pytest.Item) -> int:
    marker = item.get_closest_marker("drawn")
    return 1 if marker is None or item.config.getoption("--one-case") else int(marker.args[0])


def _draw(item: pytest.Item) -> int:
    return zlib.crc32(item.nodeid.encode())


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)

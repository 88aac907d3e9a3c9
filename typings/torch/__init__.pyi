"""What mypy reads in place of torch: torch.fx has types, everything else is Any.

Reading torch itself more than doubles mypy's time, and its `Node.args` are unions that hold for nothing in particular:
a cast a line. Here `args` and `kwargs` hold Any; what nodes, graphs and their modules *have* is exact, so that a wrong
attribute or argument is found (tests/test_typings.py compares with the torch that is installed).
"""

from typing import Any

from torch import fx as fx

def __getattr__(name: str) -> Any: ...

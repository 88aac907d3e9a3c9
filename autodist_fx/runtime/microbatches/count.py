"""`microbatches=`: a number, or "auto", by which the plan's own forecast decides."""

from __future__ import annotations

from typing import Literal

from autodist_fx.errors import AutodistError

Microbatches = int | Literal["auto"]
MOST = 1024


def checked(value: object, default: Microbatches = "auto") -> Microbatches:
    """Return the option as it is to be used; `default` for None. Raises AutodistError for any other value."""
    if value is None:
        return default
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST:
        return value
    raise AutodistError(f'microbatches={value!r} is neither "auto" nor a number of 1 to {MOST}')

"""from artifact."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")




"""The table of op rules: one row a kind, put together from a table in each file."""

from __future__ import annotations

import pytest

from cost_model.rules.table import one_table


def test_a_kind_with_two_rows_is_an_error_that_names_both_files() -> None:
    with pytest.raises(ValueError, match=r"'view' has a row in views\.py and another in indexing\.py"):
        one_table(views={"view": 1, "split": 2}, indexing={"index": 3, "view": 4})
    assert one_table(views={"view": 1}, indexing={"index": 3}) == {"view": 1, "index": 3}

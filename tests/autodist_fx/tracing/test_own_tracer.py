"""The tracer that stands where transformers ships none: what its proxies do where nothing is known of their value."""

from __future__ import annotations

import pytest
from torch.fx import Graph
from torch.fx.proxy import TraceError

from autodist_fx.tracing.versions.own_tracer import SymbolicProxy


def test_in_asks_the_known_value_and_else_is_refused_as_a_loop_over_the_proxy() -> None:
    proxy = SymbolicProxy(Graph().placeholder("x"))
    with pytest.raises(TraceError, match="cannot be iterated"):
        assert 3 in proxy
    proxy.install_metadata((2, 3))
    assert 3 in proxy and 4 not in proxy

from collections.abc import Callable, Iterator
from typing import Any

from torch.fx.graph import Graph
from torch.fx.node import Node

class TraceError(ValueError): ...

class Scope:
    module_path: str
    module_type: Any
    def __init__(self, module_path: str, module_type: Any) -> None: ...

class TracerBase:
    graph: Graph
    record_stack_traces: bool
    check_mutable_operations: bool
    trace_asserts: bool
    proxy_buffer_attributes: bool
    traced_func_name: str
    scope: Scope
    module_stack: Any
    node_name_to_scope: dict[str, tuple[str, type]]
    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> Node: ...
    def proxy(self, node: Node) -> Proxy: ...
    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[Node], Proxy] | None = None,
    ) -> Proxy: ...
    def create_arg(self, a: Any) -> Any: ...
    def to_bool(self, obj: Proxy) -> bool: ...
    def iter(self, obj: Proxy) -> Iterator[Any]: ...
    def keys(self, obj: Proxy) -> Any: ...

class GraphAppendingTracer(TracerBase):
    def __init__(self, graph: Graph) -> None: ...

class Proxy:
    node: Node
    tracer: Any
    def __init__(self, node: Node, tracer: TracerBase | None = None) -> None: ...
    # A proxy stands for any value: it has every method and operator.
    def __getattr__(self, k: str) -> Any: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __getitem__(self, key: Any) -> Any: ...
    @classmethod
    def __torch_function__(
        cls, orig_method: Any, types: Any, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None
    ) -> Any: ...

class Attribute(Proxy):
    root: Proxy
    attr: str
    def __init__(self, root: Proxy, attr: str) -> None: ...

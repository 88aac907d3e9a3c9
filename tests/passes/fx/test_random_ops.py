"""Which ops draw random numbers, held against torch: its tags, and where its generator stands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from passes.fx.nodes import is_pure
from passes.fx.random_ops import draws

X = torch.rand(2, 4, 8, 8) - 0.5
SAMPLES = torch.rand(2, 4, 2)
WEIGHTS = (torch.rand(12, 4), torch.rand(12), torch.rand(4, 4), torch.rand(4))
POOL = {"kernel_size": 2, "output_size": 3}


def _heads(x: torch.Tensor, **options: Any) -> Any:
    x = x[:, :, 0, :4]
    return F.multi_head_attention_forward(
        x, x, x, 4, 2, WEIGHTS[0], WEIGHTS[1], None, None, False, options.pop("p", 0.5), WEIGHTS[2], WEIGHTS[3],
        **options,
    )  # fmt: skip


CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "dropout": F.dropout,
    "dropout1d": lambda x: F.dropout1d(x[0]),
    "dropout2d": F.dropout2d,
    "dropout3d": lambda x: F.dropout3d(x[None]),
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rrelu at rest": F.rrelu,
    "rrelu at rest, by position": lambda x: F.rrelu(x, 0.1, 0.2, False),
    "rrelu by position": lambda x: F.rrelu(x, 0.1, 0.2, True),
    "rrelu_": lambda x: torch.rrelu_(x.clone(), training=True),
    "multi_head_attention_forward": _heads,
    "multi_head_attention_forward at rest": lambda x: _heads(x, training=False),
    "multi_head_attention_forward, p = 0": lambda x: _heads(x, p=0.0),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "scaled_dot_product_attention at rest": lambda x: F.scaled_dot_product_attention(x, x, x),
    "gumbel_softmax": F.gumbel_softmax,
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x, **POOL),
    "fractional_max_pool2d of samples": lambda x: F.fractional_max_pool2d(x, **POOL, _random_samples=SAMPLES),
    "fractional_max_pool2d_with_indices": lambda x: F.fractional_max_pool2d(x, **POOL, return_indices=True),
    "fractional_max_pool3d": lambda x: F.fractional_max_pool3d(x.repeat(1, 2, 1, 1), **POOL),
    "fractional_max_pool3d_with_indices": lambda x: F.fractional_max_pool3d(
        x.repeat(1, 2, 1, 1), **POOL, return_indices=True
    ),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "softmax": lambda x: F.softmax(x, -1),
    "svd_lowrank": lambda x: torch.svd_lowrank(x, 2),
    "randn_like": torch.randn_like,
    "binomial": lambda x: torch.binomial(x.abs(), x.abs()),
    "random_": lambda x: x.clone().random_(),
    "uniform_": lambda x: x.clone().uniform_(),
}
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Dropout": (nn.Dropout, (2, 4)),
    "Dropout, p = 0": (lambda: nn.Dropout(0.0), (2, 4)),
    "Dropout1d": (nn.Dropout1d, (2, 4, 3)),
    "Dropout2d": (nn.Dropout2d, (2, 4, 3, 3)),
    "Dropout3d": (nn.Dropout3d, (2, 4, 3, 3, 3)),
    "AlphaDropout": (nn.AlphaDropout, (2, 4)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout, (2, 4)),
    "RReLU": (nn.RReLU, (2, 4)),
    "RNN": (lambda: nn.RNN(4, 4, 2, dropout=0.5), (2, 4)),
    "LSTM": (lambda: nn.LSTM(4, 4, 2, dropout=0.5), (2, 4)),
    "LSTM of one layer": (lambda: nn.LSTM(4, 4), (2, 4)),
    "GRU": (lambda: nn.GRU(4, 4, 2, dropout=0.5), (2, 4)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2, dropout=0.5), (2, 4)),
    "MultiheadAttention, p = 0": (lambda: nn.MultiheadAttention(4, 2), (2, 4)),
    "Transformer": (lambda: nn.Transformer(4, 2, 1, 1, 8), (2, 4)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 8), (2, 4)),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(4, 2, 8), (2, 4)),
    "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, 3), (2, 4, 8, 8)),
    "FractionalMaxPool3d": (lambda: nn.FractionalMaxPool3d(2, 3), (2, 4, 8, 8, 8)),
    "Linear": (lambda: nn.Linear(4, 4), (2, 4)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (2, 4)),
}
OF_TWO = ("MultiheadAttention", "Transformer", "TransformerDecoderLayer")  # arguments, and three


def _draws(call: Callable[..., Any], *args: Any) -> bool:
    """Whether torch's generator stands elsewhere behind the call."""
    before = torch.get_rng_state()
    with torch.no_grad():
        call(*args)
    return not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", CALLS)
def test_functions(name: str) -> None:
    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return CALLS[name](x)

    graph = torch.fx.symbolic_trace(Calls()).graph
    nodes = [node for node in graph.nodes if node.op.startswith("call")]
    assert any(not is_pure(node) for node in nodes) == _draws(CALLS[name], X)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_modules(name: str, training: bool) -> None:
    make, shape = MODULES[name]
    module = make().train(training)
    graph = torch.fx.Graph(nn.ModuleDict({"it": module}))
    node = graph.call_module("it", (graph.placeholder("x"),))
    x = torch.randn(shape)
    count = (1 + (name in OF_TWO)) if not name.startswith("MultiheadAttention") else 3
    assert is_pure(node) != _draws(module, *[x] * count)


def test_no_function_of_torch_is_missing() -> None:
    """All that torch tags, under the names by which models call it."""
    names = {*dir(torch), *dir(torch.Tensor), *dir(torch.ops.aten)}
    tagged = {name for name in names if any(map(_is_tagged, _overloads(name)))}
    called = {name for name in tagged if not name.startswith(("_", "miopen", "normal_functional"))}  # no kernels
    assert {name for name in called if not _is_known(name)} == set() and len(called) > 30


def _is_tagged(overload: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in overload.tags


def _overloads(name: str) -> list[Any]:
    packet = getattr(torch.ops.aten, name, None)
    return [getattr(packet, each) for each in packet.overloads()] if hasattr(packet, "overloads") else []


def _is_known(name: str) -> bool:
    """Whether a call in training mode draws, as we see it."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    special: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), (x, (x,), (x,), True, 2, 0.5, True, False, False)),
        "scaled_dot_product_attention": (x, x, x, None, 0.5),
    }
    args = special.get(name, (x, 0.1, 0.2, True))
    return draws(graph.call_method(name, args), name, None)


def test_no_function_and_no_module_that_tells_training_apart_is_missing() -> None:
    asks = {"training", "dropout_p", "generator", "_random_samples"}
    functions = {
        name for name, value in vars(F).items() if inspect.isfunction(value) and not name.startswith("_")
        and asks & inspect.signature(value).parameters.keys()
    }  # fmt: skip
    modules = {
        name for name, value in vars(nn).items() if inspect.isclass(value) and issubclass(value, nn.Module)
        and ("Dropout" in name or {"dropout", "_random_samples"} & inspect.signature(value).parameters.keys())
    }  # fmt: skip
    assert functions <= CALLS.keys() and modules <= MODULES.keys() | {"RNNBase"}

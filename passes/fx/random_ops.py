"""Tells which functions, methods and modules draw random numbers from torch's generators.

A name that is missing here would let each rank draw numbers of its own, without a word: tests/passes/fx/
test_random_ops.py holds these against what torch tags as `nondeterministic_seeded`, and against what its functions and
modules do to its generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import Node

from passes.fx.arguments import argument

# Methods that overwrite a tensor with numbers that they draw.
RANDOM_FILLS = frozenset({
    "uniform_", "normal_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_",
})  # fmt: skip
_DROPOUTS = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
_MAX_POOLS = tuple(f"fractional_max_pool{dims}d{more}" for dims in (2, 3) for more in ("", "_with_indices"))
# Draw whatever their arguments are; dropouts that do nothing are removed before anybody asks (remove_no_ops).
_ALWAYS = RANDOM_FILLS | {
    *_DROPOUTS, *(f"{name}_" for name in _DROPOUTS), "dropout1d", "dropout2d", "dropout3d", "native_dropout",
    "gumbel_softmax", "bernoulli", "bernoulli_", "binomial", "multinomial", "poisson", "normal", "uniform",
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like",
    "exponential", "geometric", "cauchy", "log_normal", "random", "svd_lowrank", "pca_lowrank",
    "get_approximate_basis", "rrelu_with_noise", "rrelu_with_noise_", "rrelu_with_noise_functional",
    "_fused_dropout", "_standard_gamma", "_sample_dirichlet",
}  # fmt: skip
# Those that do so in training mode alone -> the positions of that argument and of a probability (which is 0.5 if none).
_IN_TRAINING = {"rrelu": (3, None), "rrelu_": (3, None), "multi_head_attention_forward": (13, 10)}
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def draws(node: Node, name: str, module: nn.Module | None) -> bool:
    """Returns whether a call draws random numbers. `name` is the op's, `module` what a call_module node calls."""
    if module is not None:
        return any(_module_draws(each) for each in module.modules())
    if node.op not in ("call_function", "call_method"):
        return False
    if name in _IN_TRAINING:
        training, p = _IN_TRAINING[name]
        active = argument(node, training, "training", name == "multi_head_attention_forward")
        return active is not False and (p is None or argument(node, p, "dropout_p", 0.5) != 0)
    if name == "scaled_dot_product_attention":
        return argument(node, 4, "dropout_p", 0.0) != 0
    if name.removeprefix("_") in _MAX_POOLS:
        return argument(node, 5, "_random_samples") is None
    if name in _RECURRENT:
        return _recurrent_draws(node.args)
    return name in _ALWAYS


def _recurrent_draws(args: Sequence[Any]) -> bool:
    """Returns whether torch.lstm(x, states, weights, has_biases, layers, dropout, train, ...) drops out between layers;
    packed sequences have their lengths in front of the states, and the weights one further."""
    first = next((at for at, value in enumerate(args) if isinstance(value, bool)), None)
    if first is None or len(args) < first + 4:
        return True  # by name, or in a way that nothing here knows
    layers, dropout, train = args[first + 1 : first + 4]
    return layers != 1 and dropout != 0 and train is not False


def _module_draws(module: nn.Module) -> bool:
    """Returns whether a module, its submodules aside, draws when it is called."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.training and module.p > 0
    if isinstance(module, nn.RReLU):
        return module.training
    if isinstance(module, nn.RNNBase):
        return module.training and module.dropout > 0 and module.num_layers > 1
    if isinstance(module, nn.MultiheadAttention):
        return module.training and module.dropout > 0
    if isinstance(module, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
        return module._random_samples is None
    return False

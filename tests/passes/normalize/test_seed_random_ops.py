"""Random ops become functions of an input, which know where the rows of the batch lie."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from passes.fx.randomness import seeded_nodes, unseeded_nodes
from passes.fx.text import graph_text
from passes.normalize.pipeline import normalize
from passes.normalize.random.seed_random_ops import why_unseeded
from passes.ops.random import keep_mask, random_state, seeded_uniform
from tests.support.graphs.small import examples, traced

STATE = random_state(3, 1, 5)
Outputs = dict[str, torch.Tensor]


def normalized(module: nn.Module, **inputs: tuple[str | int, ...]) -> torch.fx.GraphModule:
    return normalize(traced(module).train(), examples(inputs))


class Attention(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> Outputs:
        y = F.scaled_dot_product_attention(
            q, k, k, attn_mask=mask, dropout_p=0.25, is_causal=self.causal, scale=0.5, enable_gqa=True
        )
        return {"y": y}


def test_attention_is_written_out() -> None:
    after = normalized(Attention(), q=("B", 4, "S", 8), k=("B", 2, "T", 8), mask=("B", 1, "S", "T"))
    assert_expected_inline(graph_text(after), """\
q : f64[B, 4, S, 8] = input
k : f64[B, 2, T, 8] = input
mask : f64[B, 1, S, T] = input
random_state : i64[3] = input
repeat_interleave : f64[B, 4, T, 8] = repeat_interleave(k, 2, 1)
transpose : f64[B, 4, 8, T] = transpose(repeat_interleave, -2, -1)
matmul : f64[B, 4, S, T] = matmul(q, transpose)
mul : f64[B, 4, S, T] = mul(matmul, 0.5)
add : f64[B, 4, S, T] = add(mul, mask)
safe_softmax : f64[B, 4, S, T] = safe_softmax(add, -1)
dropout : f64[B, 4, S, T] = seeded_dropout(safe_softmax, random_state, 0, 0.25, 4, (0, 1, 1))
matmul_1 : f64[B, 4, S, 8] = matmul(dropout, repeat_interleave)
return {y: matmul_1}""")


@pytest.mark.parametrize("kind", ["bool", "float", "-inf", "causal", "none"])
def test_attention_is_torchs(kind: str) -> None:
    """Weights by torch's own op, times the mask; a row that sees nothing gives zeros and a gradient of zero."""
    q, k = torch.randn(2, 4, 5, 8, dtype=torch.float64), torch.randn(2, 2, 5, 8, dtype=torch.float64)
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    seen[0, :, 0] = False
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf if kind == "-inf" else -1e300)
    mask = {"bool": seen, "float": added, "-inf": added}.get(kind)
    causal = kind == "causal"

    class Masked(Attention):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> Outputs:
            return super().forward(q, k, None)

    inputs: dict[str, tuple[str | int, ...]] = {"q": ("B", 4, "S", 8), "k": ("B", 2, "S", 8)}
    module: nn.Module = Masked(causal)
    if mask is not None:
        module, inputs["mask"] = Attention(), ("B", 1, "S", "S")
    graph = traced(module)
    example = examples(inputs)
    if kind == "bool":
        for one in example:
            one.inputs["mask"] = one.inputs["mask"].to(torch.bool)  # type: ignore[index]
    after = normalize(graph, example)
    q.requires_grad_()
    given = {"q": q, "k": k} | ({} if mask is None else {"mask": mask})
    found = after(**given, random_state=STATE)["y"]
    eye = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)
    weights = F.scaled_dot_product_attention(q, k, eye, mask, 0.0, causal, scale=0.5, enable_gqa=True)
    keep = keep_mask(STATE, 0, 0.25, (2, 4, 5, 5), (0, 1, 1))
    wanted = (weights * keep / 0.75) @ k.repeat_interleave(2, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    of_found, of_wanted = (torch.autograd.grad(y.square().sum(), q)[0] for y in (found, wanted))
    torch.testing.assert_close(of_found, of_wanted, rtol=1e-12, atol=1e-12)


class Places(nn.Module):
    """The batch first, folded with what is inside of it, with what is outside, second, and nowhere."""

    def forward(self, x: torch.Tensor) -> Outputs:
        batch, seq, width = x.size()
        tokens = F.relu(x.reshape(batch * seq, width))
        outside = x.reshape(batch, seq, 4, 3).permute(2, 0, 1, 3).reshape(4 * batch, seq, 3)
        drop = nn.functional.dropout
        return {
            "first": drop(x, 0.5), "tokens": drop(tokens, 0.5), "outside": drop(outside, 0.5),
            "second": drop(x.transpose(0, 1), 0.5), "nowhere": drop(x.sum(0), 0.5), "channels": F.dropout1d(x, 0.5),
        }  # fmt: skip


def test_rows_are_found_wherever_they_lie() -> None:
    """The same elements of a row are dropped in any form, and a row at a time is as all rows at once."""
    after = normalized(Places(), x=("B", "S", 12))
    assert [node.name for node in seeded_nodes(after)] == [
        "dropout", "dropout_1", "dropout_2", "dropout_3", "dropout_4", "dropout1d"
    ]  # fmt: skip
    x = torch.ones(3, 5, 12, dtype=torch.float64)
    found = after(x=x, random_state=random_state(3))
    first = keep_mask(random_state(3), 0, 0.5, (3, 5, 12), (0, 1, 1))
    assert torch.equal(found["first"] != 0, first)
    tokens = keep_mask(random_state(3), 1, 0.5, (3, 5, 12), (0, 1, 1))
    assert torch.equal(found["tokens"].view(3, 5, 12) != 0, tokens)
    outside = keep_mask(random_state(3), 2, 0.5, (4, 3, 5, 3), (1, 1, 1))
    assert torch.equal(found["outside"].view(4, 3, 5, 3) != 0, outside)
    assert torch.equal(found["second"] != 0, keep_mask(random_state(3), 3, 0.5, (5, 3, 12), (1, 1, 1)))
    channels = keep_mask(random_state(3), 5, 0.5, (3, 5), (0, 1, 1))
    assert torch.equal(found["channels"] != 0, channels[..., None].expand(3, 5, 12))
    for row in range(3):
        alone = after(x=x[row : row + 1], random_state=random_state(3, 0, row))
        assert torch.equal(alone["tokens"], found["tokens"][5 * row : 5 * row + 5])
        assert torch.equal(alone["outside"].view(4, 5, 3), found["outside"].view(4, 3, 5, 3)[:, row])
        assert torch.equal(alone["second"], found["second"][:, row : row + 1])
        assert torch.equal(alone["nowhere"] != 0, found["nowhere"] != 0)


class Uniform(nn.Module):
    def forward(self, x: torch.Tensor) -> Outputs:
        jitter = torch.empty_like(x)
        jitter.uniform_(0.5, 1.5)
        coins = torch.bernoulli(torch.sigmoid(x))
        return {"jitter": x * jitter, "coins": coins, "kept": x * torch.empty_like(x[:, :1]).bernoulli_(0.75)}


def test_uniform_numbers_and_coins() -> None:
    after = normalized(Uniform(), x=("B", "S"))
    x = torch.randn(40, 6, dtype=torch.float64)
    found = after(x=x, random_state=STATE)
    drawn = [seeded_uniform(STATE, op, (40, 6), torch.float64, row=(0, 1, 1)) for op in range(2)]
    torch.testing.assert_close(found["jitter"], x * (drawn[0] + 0.5), rtol=1e-15, atol=0.0)
    assert torch.equal(found["coins"], (drawn[1] < torch.sigmoid(x)).double())
    kept = seeded_uniform(STATE, 2, (40, 1), torch.float64, row=(0, 1, 1)) < 0.75
    assert torch.equal(found["kept"], x * kept)


class Leaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.RReLU(0.2, 0.6)

    def forward(self, x: torch.Tensor) -> Outputs:
        return {"module": self.act(x), "function": F.rrelu(x, training=True), "at rest": F.rrelu(x)}


def test_slopes_of_rrelu() -> None:
    after = normalized(Leaky(), x=("B", "S"))
    x = torch.randn(40, 6, dtype=torch.float64)
    found = after(x=x, random_state=STATE)
    for op, (name, low, high) in enumerate([("module", 0.2, 0.6), ("function", 1 / 8, 1 / 3)]):
        slopes = seeded_uniform(STATE, op, (40, 6), torch.float64, low, high, row=(0, 1, 1))
        assert torch.equal(found[name], torch.where(x > 0, x, x * slopes))
    assert torch.equal(found["at rest"], F.rrelu(x))


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.states = nn.GRU(6, 6, num_layers=2, dropout=0.5)

    def forward(self, x: torch.Tensor) -> Outputs:
        return {
            "recurrent": self.states(x)[0],
            "normal": torch.randn_like(x),
            "alpha": F.alpha_dropout(x, 0.5, True),
            "pairs": F.dropout(x @ x.t(), 0.5),
        }


def test_what_cannot_be_seeded_says_why() -> None:
    after = normalized(Refused(), x=("B", 6))
    reasons = {str(node): why_unseeded(node) for node in unseeded_nodes(after)}
    assert reasons == {
        "states": "no rule says how GRU is drawn alike on every mesh",
        "randn_like": "no rule says how randn_like is drawn alike on every mesh",
        "alpha_dropout": "no rule says how alpha_dropout is drawn alike on every mesh",
        "dropout": "rows of the batch lie along several dims of [B, B]",
    }


def test_a_number_that_nothing_reads_goes() -> None:
    class Unread(nn.Module):
        def forward(self, x: torch.Tensor) -> Outputs:
            F.dropout(x, 0.5)
            return {"y": x + 1}

    after = normalized(Unread(), x=("B", 6))
    assert [node.target for node in after.graph.nodes if node.op == "placeholder"] == ["x"]

"""Teach the planner an operation that it does not know: a rule says along which dims it falls apart.

    python examples/op_rule.py

Here a model smooths its MLP's values over the tokens by logcumsumexp. Without a rule it runs whole on every rank, and
what it reads has to be gathered first. With one, it stays cut as the MLP is.
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import autodist_fx as adx
from cost_model.rules.rule import DimLink, Factor, OpRule
from cost_model.rules.table import RULES
from passes.fx.arguments import argument
from passes.op_graph.table import HANDLERS


class Smooth(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, tokens, width]
        return torch.logcumsumexp(x, 1)


def rule(inputs, outputs, attrs):
    """x [...] -> [...]: each dim but the one that is scanned is a factor, along which the op may be cut."""
    shape = inputs[0]
    scanned = attrs["dim"] % len(shape)
    free = [d for d in range(len(shape)) if d != scanned]
    return OpRule(tuple(Factor(f"d{d}", shape[d], (DimLink(0, d),), (DimLink(0, d),)) for d in free))


def handler(builder, node, inputs):
    """Say torch's call in the rule's words: (kind, inputs, attributes)."""
    return "logcumsumexp", inputs, {"dim": argument(node, 1, "dim")}


def main() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=1)).double().eval()
    for layer in model.model.layers:
        layer.mlp.act_fn = Smooth()
    before = adx.compile(model, tp=2, hardware="cpu-gloo")
    print(next(warning for warning in before.plan.warnings if "logcumsumexp" in warning))
    print("without a rule", {name: times for name, times, _ in before.plan.stages[0].collectives})

    RULES["logcumsumexp"], HANDLERS["logcumsumexp"] = rule, handler
    after = adx.compile(model, tp=2, hardware="cpu-gloo")
    print("with the rule ", {name: times for name, times, _ in after.plan.stages[0].collectives})

    ids = torch.arange(12).view(2, 6)
    difference = (after.simulate(input_ids=ids).logits - model(ids).logits).abs().max().item()
    print(f"largest difference to the whole model: {difference:.1e}")


if __name__ == "__main__":
    main()

"""Rewrite the ranks' graphs with a pass of your own: here each all_reduce sends bfloat16, half the bytes of float32.

    python examples/custom_pass.py

A rank's program is a torch.fx.GraphModule with the messages in it, so a pass is a function that edits a graph.
"""

import torch
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM, LlamaConfig

import autodist_fx as adx
from autodist_fx.course.ranks import messages, on_ranks
from passes.ops.comm import all_reduce


def compress_all_reduces(graph_module: GraphModule) -> int:
    """Send in bfloat16, and go on in the dtype from before; return how many all_reduces there were.

    before  %r = all_reduce(%x, axis="tp")
    after   %small = %x.to(bfloat16); %r = all_reduce(%small, axis="tp"); %back = %r.to(float32)
    """
    graph = graph_module.graph
    found = [node for node in graph.nodes if node.target is all_reduce]
    for node in found:
        with graph.inserting_before(node):
            small = graph.call_method("to", (node.args[0], torch.bfloat16))
        with graph.inserting_after(node):
            back = graph.call_method("to", (node, torch.float32))
        node.replace_all_uses_with(back)
        back.args = (node, torch.float32)  # it is one of the users
        node.args = (small, *node.args[1:])
    graph.lint()
    graph_module.recompile()
    return len(found)


def main() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=1)).eval()
    ranks = [adx.compile(model, tp=2).rank(rank, weights=True) for rank in range(2)]
    changed = [compress_all_reduces(graph_module) for graph_module in ranks]

    inputs = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with torch.no_grad():
        whole = model(**inputs).logits
        split = on_ranks(lambda rank: ranks[rank](**inputs)["logits"], tp=2)[0]
        said = messages(lambda rank: ranks[rank](**inputs), tp=2)[0]
    print(f"{changed[0]} all_reduces in bfloat16; rank 0 says {dict(said)}")
    print(f"logits differ by {(split - whole).abs().max().item():.4f} of {whole.abs().max().item():.4f} at most")


if __name__ == "__main__":
    main()

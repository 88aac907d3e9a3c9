"""phase_times on two ranks: each node once, waits in front of collectives, and a model that answers as before."""

import pytest
import torch

from autodist_fx.runtime.execution.phase_times import phase_times
from cost_model.mesh import Mesh
from tests.support.models import padded_batch, tiny_model
from tests.support.ranks import on_ranks

IDS, _ = padded_batch(1, 5)
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def test_what_two_ranks_spend():
    model = tiny_model("llama", num_hidden_layers=1)

    def work(split):
        found = phase_times(split, IDS, 3)
        return found, split.generate(IDS, **GREEDY), split(IDS).logits

    with torch.no_grad():
        tokens, logits = model.generate(IDS, **GREEDY), model(IDS).logits
    for rank, (found, made, answer) in enumerate(on_ranks(model, Mesh(tp=2), work)):
        assert torch.equal(made, tokens)
        torch.testing.assert_close(answer, logits)
        assert [*found] == ["forward", "prefill", "decode"]
        for name, phase in found.items():
            nodes = phase["nodes"]
            assert phase["program_seconds"] == pytest.approx(sum(n["seconds"] + n["waiting"] for n in nodes))
            collectives = [n for n in nodes if n["is_comm"]]
            assert len(collectives) > 2 and all(n["waiting"] > 0 for n in collectives)
            assert not any(n["waiting"] for n in nodes if not n["is_comm"])
            products = [op for n in nodes if n["kind"] == "linear" for op in n["ops"]]
            assert len(products) == len(set(products)) == 8  # q, k, v, o, gate, up, down, and the logits'
            leads = name != "forward" and rank == 0
            assert (phase["model_seconds"] is not None) == leads
            if leads:
                assert phase["model_seconds"] > 0

"""A second opinion on traced graphs: what transformers' own exporter makes of the same model with torch.export.

Nothing of ours takes part in it. Both graphs get inputs of sizes that neither was made with, and are compared in what
they give, in the parameters that they read, and in the products, lookups and convolutions that they make.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from tests.support.encoders import tiny_encoder
from tests.support.graphs.products import CountedWork
from tests.support.graphs.traced import with_weights
from tests.support.media.images import question, vision_model
from tests.support.models import padded_batch, relative_error, tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.seq2seq import seq2seq_inputs, tiny_seq2seq
from tests.support.state_space import state_space_model

dynamo = pytest.importorskip("transformers.exporters.exporter_dynamo", reason="transformers 4.57 has no exporter")

Inputs = dict[str, torch.Tensor]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{family: lambda family=family: tiny_model(family, num_hidden_layers=1, n_layer=1) for family in (
        "llama", "qwen3", "gpt2", "phi3", "olmo2", "gemma2",
    )},
    "gemma3_text": lambda: tiny_model("gemma3_text", layer_types=["sliding_attention", "full_attention"]),
    **{family: lambda family=family: tiny_moe_model(family, num_hidden_layers=1) for family in (
        "mixtral", "gpt_oss", "deepseek_v3",
    )},
    "lfm2": lambda: state_space_model("lfm2"),
    "t5": lambda: tiny_seq2seq("t5", layers=1),
    "whisper": lambda: tiny_seq2seq("whisper", layers=1),
    "bert": lambda: tiny_encoder("BertForMaskedLM", "bert", num_hidden_layers=1),
    "llava": lambda: vision_model("llava"),
}  # fmt: skip
# its features are those before its last norm
UNREAD = {"llava": {f"model.vision_tower.post_layernorm.{name}" for name in ("weight", "bias")}}


def inputs_of(family: str, model: PreTrainedModel, size: int) -> Inputs:
    """Return a batch of `size` 0, 1 or 2, which differ in the number of sequences and in all lengths."""
    rows, tokens = ((2, 9), (3, 14), (1, 5))[size]
    if family == "llava":
        return question(family, ((1, 1), (1, 0, 1), (2,))[size])  # how many images there are is a constant of ours
    if model.config.is_encoder_decoder:
        return seq2seq_inputs(model, rows, tokens + 2, tokens)
    ids, mask = padded_batch(rows, tokens, vocab=90)
    return {"input_ids": ids, "attention_mask": mask}


def exported(model: PreTrainedModel, inputs: Inputs) -> torch.fx.GraphModule:
    """Return transformers' own exported program, for all sizes, with the model's parameters, and without what nothing
    reads (LLaVA's pooled image)."""
    model.config.use_cache = False
    if hasattr(model.config, "text_config"):
        model.config.text_config.use_cache = False
    if any("experts" in name for name, _ in model.named_parameters()):
        model.set_experts_implementation("grouped_mm")
    program, _ = dynamo.DynamoExporter().export_program(model, dict(inputs), dynamo.DynamoConfig(dynamic=True))
    module = program.module()
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_the_planned_graph_and_transformers_own_export_agree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # pytest's: it would format all of a trace
    model = MODELS[family]()
    first = inputs_of(family, model, 0)
    names = None if family == "llava" else tuple(first)  # the graph for images is made of a call
    compiled = adx.compile(model, input_names=names, verify=False)
    compiled.simulate(**first)
    graph = with_weights(compiled.variants[-1].traced, model)
    program = exported(model, first)

    parameters = dict(model.named_parameters())
    of_experts = {tuple(p.shape[1:]) for p in parameters.values() if p.dim() == 3}
    of_experts |= {sizes[::-1] for sizes in of_experts}
    for size in (1, 2):
        inputs = inputs_of(family, model, size)
        ours, theirs = CountedWork(parameters), CountedWork(parameters)
        with ours:
            found = graph(**inputs)["logits"]
        with theirs:
            wanted = program(**inputs).logits
        kept = inputs["attention_mask"].bool() if "decoder_input_ids" not in inputs else ...
        assert relative_error(found[kept], wanted[kept]) <= 1e-6  # norms and rotary tables are float32 in most of these
        assert ours.read == theirs.read and {*parameters} - ours.read <= UNREAD.get(family, set())
        assert ours.rows == theirs.rows
        once_an_expert = {work for work in ours.calls if work[1] in of_experts}  # theirs are one call for all experts
        for calls in (ours.calls, theirs.calls):
            for work in once_an_expert:
                calls.pop(work)
        assert ours.calls == theirs.calls

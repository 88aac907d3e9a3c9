"""transformers 5's conversions of checkpoints, in slices: equal to its own loading, and nothing else is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import autodist_fx as adx
from autodist_fx.errors import CheckpointError
from autodist_fx.tracing import empty_model
from autodist_fx.weights.load_program import load_program
from autodist_fx.weights.sources.safetensors_source import SafetensorsSource
from autodist_fx.weights.sources.source import WeightSource
from autodist_fx.weights.versions import named_as_in
from tests.support.models import randomized

pytest.importorskip("transformers.core_model_loading", reason="transformers 4.57 converts nothing")

Tensors = dict[str, torch.Tensor]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16, "n_shared_experts": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_d_state": 8, "mamba_dt_rank": 4,
    "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_sparse_step": 1,
}  # fmt: skip
# latent attention: a head's rotary part, and as many heads of keys as of queries
FAMILY_SIZES = {"deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4}}
EXPERTS = {  # a tensor of the hub's layout, by family; in the model one tensor has those of all experts
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w3.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.up_proj.weight",
    "qwen3_next": "model.layers.1.mlp.experts.3.up_proj.weight",
    "deepseek_v3": "model.layers.1.mlp.experts.3.up_proj.weight",
    "jamba": "model.layers.1.feed_forward.experts.3.up_proj.weight",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj",
}


def checkpoint(family: str, directory: Path, **sizes: object) -> Path:
    """Save a tiny model with random weights in the hub's layout."""
    known = AutoConfig.for_model(family)
    wanted = {**SIZES, **FAMILY_SIZES.get(family, {}), **sizes}
    fitting = {name: size for name, size in wanted.items() if hasattr(known, name)}
    config = AutoConfig.for_model(family, **fitting)
    randomized(AutoModelForCausalLM.from_config(config).float().eval()).save_pretrained(directory)
    return directory


def changed(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return directory


def opened(directory: Path) -> tuple[PreTrainedModel, SafetensorsSource, WeightSource]:
    model = empty_model(AutoConfig.from_pretrained(directory), torch.float32)
    stored = SafetensorsSource(directory)
    return model, stored, named_as_in(model, stored)


@pytest.mark.parametrize("family", EXPERTS)
def test_slices_equal_transformers_own_loading_and_read_their_bytes_alone(family: str, tmp_path: Path) -> None:
    _, stored, source = opened(checkpoint(family, tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert EXPERTS[family] in stored.names()
    assert source.names() == loaded.keys()
    for name, whole in loaded.items():
        assert source.shape(name) == tuple(whole.shape) and source.dtype(name) == torch.float32
        assert torch.equal(source.read(name), whole), name
        for dim, size in enumerate(whole.shape):
            for rank in range(2):  # as tp=2 cuts it; with grains of two, as heads are dealt
                intervals = ((rank * size // 2, (rank + 1) * size // 2),)
                if size % 8 == 0:
                    intervals = tuple((start, start + 2) for start in range(2 * rank, size, 4))
                before = stored.bytes_read
                expected = torch.cat([whole.narrow(dim, a, b - a) for a, b in intervals], dim)
                assert torch.equal(source.read(name, dim, intervals), expected), (name, dim)
                assert stored.bytes_read - before == expected.numel() * 4, (name, dim)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("family", EXPERTS)
def test_each_of_two_ranks_reads_half_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    checkpoint(family, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    model = opened(tmp_path)[0]
    compiled = adx.compile(model, tp=2, input_names=("input_ids", "attention_mask"), verify=False)
    for rank in range(2):
        program, (_, stored, source) = compiled.program(rank), opened(tmp_path)
        report = load_program(model, source, compiled.buffers, program)
        held = dict(program.graph_module.named_parameters(remove_duplicate=False))
        for name, shard in program.param_shards.items():
            if not shard.is_buffer:
                whole = loaded[shard.source]
                parts = [whole.narrow(shard.dim, a, b - a) for a, b in shard.intervals] if shard.intervals else [whole]
                assert torch.equal(held[name], torch.cat(parts, shard.dim or 0)), name
        assert report.bytes_read == stored.bytes_read <= 0.53 * report.checkpoint_bytes


def test_a_conversion_that_computes_is_run_on_whole_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import ConversionOps, WeightConverter

    from autodist_fx.weights.sources import converted_source

    class Negate(ConversionOps):
        def convert(self, input_dict, source_patterns, target_patterns, **_):
            return {target_patterns[0]: -input_dict[source_patterns[0]][0]}

    before = load_file(checkpoint("llama", tmp_path) / "model.safetensors")
    changed(tmp_path, lambda _: {n.replace("o_proj", "minus_o"): -x if "o_proj" in n else x for n, x in before.items()})
    converter = WeightConverter("self_attn.minus_o.weight", "self_attn.o_proj.weight", operations=[Negate()])
    monkeypatch.setattr(converted_source, "get_model_conversion_mapping", lambda _: [converter])
    _, stored, source = opened(tmp_path)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert source.names() == before.keys() and stored.bytes_read == 0
    assert torch.equal(source.read(name, 1, ((8, 16),), torch.float64), before[name][:, 8:16].double())
    assert stored.bytes_read == before[name].numel() * 4  # the slice costs the tensor that it is of


def test_a_fingerprint_is_of_what_is_stored_and_reads_no_names(tmp_path: Path) -> None:
    _, stored, source = opened(checkpoint("mixtral", tmp_path))
    found = source.fingerprint()
    assert found == stored.fingerprint()
    name = EXPERTS["mixtral"]
    changed(tmp_path, lambda tensors: {**tensors, name: tensors[name] + 1e-4})
    assert opened(tmp_path)[2].fingerprint() != found


def test_an_expert_in_integers_gives_its_layer_their_dtype(tmp_path: Path) -> None:
    name = EXPERTS["mixtral"]
    checkpoint("mixtral", tmp_path)
    changed(tmp_path, lambda tensors: {**tensors, name: tensors[name].to(torch.int8)})
    _, _, source = opened(tmp_path)
    assert source.dtype("model.layers.1.mlp.experts.gate_up_proj") == torch.int8  # load_rank refuses it by name
    assert source.dtype("model.layers.0.mlp.experts.gate_up_proj") == torch.float32


def test_names_that_a_wrapper_left_stay_names_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoint("mixtral", tmp_path)
    changed(tmp_path, lambda tensors: {f"_orig_mod.{name}": x for name, x in tensors.items()})
    _, _, source = opened(tmp_path)
    assert "_orig_mod.model.layers.0.mlp.experts.gate_up_proj" in source.names()  # load_rank names the prefix
    assert "model.layers.0.mlp.experts.gate_up_proj" not in source.names()


def test_tied_names_with_different_values_are_refused(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path, tie_word_embeddings=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    changed(tmp_path, lambda tensors: {**tensors, head: tensors[embedding].clone()})
    assert opened(tmp_path)[2].read(embedding, 0, ((0, 32),)).shape == (32, 32)
    changed(tmp_path, lambda tensors: {**tensors, head: tensors[head] + torch.arange(64.0)[:, None].gt(40)})
    source = opened(tmp_path)[2]
    source.read(embedding, 0, ((0, 32),))  # the rows that this rank holds are the same
    with pytest.raises(CheckpointError, match=f"config ties {embedding} and {head}.*tie_word_embeddings=false"):
        source.read(embedding, 0, ((32, 64),))


def test_experts_that_do_not_go_together_name_the_tensor(tmp_path: Path) -> None:
    name = EXPERTS["qwen3_moe"]
    checkpoint("qwen3_moe", tmp_path)
    changed(tmp_path, lambda tensors: {**tensors, name: tensors[name][:, :5].clone()})
    with pytest.raises(CheckpointError, match=r"cannot make model\.layers\.1\.mlp\.experts\.gate_up_proj of model"):
        opened(tmp_path)[2].names()

"""Models that count the positions of a call which leaves them out: found out, followed, or refused by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.calls.cache_names import CACHE_FIELD, cache_of
from autodist_fx.compiler.generation_traits import last_logits_only
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.runtime.family_positions import positions_of_values
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.startup.from_artifact import share
from autodist_fx.tracing.meta_model import meta_copy
from tests.support.models import relative_error, tiny_model

IDS = torch.tensor([[0, 0, 14, 15, 16], [9, 10, 11, 12, 13]])
CALL = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "use_cache": True}
NEXT = {
    "input_ids": torch.tensor([[7], [8]]),
    "attention_mask": torch.cat([CALL["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1),
}


def _model(family: str) -> PreTrainedModel:
    decoder = {} if family in ("bloom", "gpt2", "llama", "opt", "biogpt") else {"is_decoder": True}
    return tiny_model(family, num_hidden_layers=1, n_layer=1, **decoder)


@pytest.mark.parametrize(
    "family", ["bert", "biogpt", "bloom", "data2vec-text", "gpt2", "llama", "opt", "roberta", "roberta-prelayernorm"]
)
@torch.no_grad()
def test_who_counts_by_values(family: str) -> None:
    """Those whose answer for padded rows is another with positions 0, 1, 2, ... than without positions."""
    model = _model(family).float()  # 4.57's masks of BERT know no float64
    with_positions: dict[str, Any] = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        with_positions["position_ids"] = torch.arange(5).expand(2, 5)
    plain = {**CALL, "use_cache": False}
    differ = relative_error(model(**plain).logits[:, -1], model(**plain, **with_positions).logits[:, -1]) > 1e-3
    assert positions_of_values(meta_copy(model)) == differ
    assert not differ or family not in ("bert", "bloom", "gpt2", "llama")


def _last(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a padded prompt's last tokens, and those of a step that goes on with its cache."""
    prompt = model(**CALL)
    return prompt.logits[:, -1], model(**NEXT, **{CACHE_FIELD: cache_of(prompt)}).logits[:, -1]


def _assert_as(truth: Any, found: Any) -> None:
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(found, truth, strict=True))


@torch.no_grad()
def test_an_artifact_refuses_such_a_call_or_has_its_graph(tmp_path: Path) -> None:
    model = _model("opt")
    compiled = adx.compile(model, tp=2)
    compiled.save(tmp_path / "without")
    loaded = adx.load(tmp_path / "without")
    with pytest.raises(AutodistError, match=r"no variant for a call with input_ids.*or pass position_ids"):
        loaded.simulate(**CALL)
    told = {**CALL, "position_ids": torch.arange(5).expand(2, 5)}
    last = loaded.simulate(**told, **last_logits_only(model)).logits[:, -1]  # as it was saved: to generate
    assert relative_error(last, model(**told).logits[:, -1]) < 1e-9

    compiled.simulate(**CALL)
    compiled.save(tmp_path / "with")
    _assert_as(_last(model), _last(adx.load(tmp_path / "with").simulate))


@pytest.mark.parametrize("has_graph", [False, True])
@torch.no_grad()
def test_ranks_of_an_artifact(has_graph: bool, tmp_path: Path) -> None:
    model = _model("opt")
    compiled = adx.compile(model, tp=2)
    if has_graph:
        compiled.simulate(**CALL, **last_logits_only(model))  # as ranks run it
    compiled.save(tmp_path / "saved")

    def on_rank(rank: int, communicator: Any) -> Any:
        artifact = adx.load(tmp_path / "saved")
        split: Any = share(artifact, JoinedRank(artifact.mesh, rank, torch.device("cpu"), communicator))
        assert split.generate(IDS, attention_mask=CALL["attention_mask"], max_new_tokens=3).shape == (2, 8)
        return _last(split)

    if has_graph:
        for found in ThreadWorld(compiled.mesh).run(on_rank):
            _assert_as(_last(model), found)
    else:
        with pytest.raises(AutodistError, match=r"no variant for a call with input_ids.*or pass position_ids"):
            ThreadWorld(compiled.mesh).run(on_rank)


@pytest.mark.parametrize(("family", "differs"), [("roberta", True), ("llama", False)])
def test_a_forward_without_mask_and_cache_is_asked_by_what_it_takes(family: str, differs: bool) -> None:
    model = meta_copy(_model(family))
    plain = model.forward
    vars(model)["forward"] = lambda input_ids=None, position_ids=None: plain(input_ids, position_ids=position_ids)
    assert positions_of_values(model) == differs

"""strict: a plan with ops that no rule shards is refused, however it is asked for and wherever it comes from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedModel

import autodist_fx as adx
from cost_model.errors import PlanError
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_options import PlanOptions
from tests.support.command_line import fails, succeeds
from tests.support.encoders import tiny_config, tiny_encoder
from tests.support.models import tiny_config as tiny_decoder_config

# A Fourier transform mixes all features of all tokens, and no rule says how it falls apart.
REFUSED = (
    r"no sharding rule for fft_fftn \(modeling_fnet\.py:\d+, 2 ops\): every tp rank repeats .*; "
    r"getattr \(modeling_fnet\.py:\d+, 2 ops\).*; add a row to cost_model/rules"
)


@pytest.fixture(scope="module")
def fnet() -> PreTrainedModel:
    return tiny_encoder("FNetForMaskedLM", "fnet")


def test_such_a_plan_is_made_with_a_warning_and_refused_where_strict(fnet: PreTrainedModel) -> None:
    plan = adx.compile(fnet, tp=2, verify=False).plan
    assert [w.split()[4] for w in plan.warnings if w.startswith("no sharding rule for")] == ["fft_fftn", "getattr"]
    with pytest.raises(PlanError, match=REFUSED):
        adx.compile(fnet, tp=2, strict=True)
    with pytest.raises(PlanError, match=REFUSED):  # one that was made without strict, too
        adx.compile(fnet, plan=plan, strict=True)


def test_where_nothing_is_repeated_strict_says_nothing(fnet: PreTrainedModel) -> None:
    assert adx.compile(fnet, pp=2, strict=True).plan.mesh.pp == 2
    config = tiny_decoder_config("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    strict = adx.compile(config, tp=2, use_cache=True, strict=True).plan
    assert strict == adx.compile(config, tp=2, use_cache=True, verify=False).plan


def test_a_mesh_is_chosen_among_those_that_lose_nothing(fnet: PreTrainedModel) -> None:
    choice = adx.choose_mesh(fnet, 4, use_cache=False, strict=True)
    assert {c.mesh.tp for c in choice.candidates} == {1}
    assert {mesh.tp for mesh, why in choice.impossible if "no sharding rule" in why} == {2, 4}


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = tmp_path / "model", tmp_path / "plan.json"
    tiny_config("fnet", architectures=["FNetForMaskedLM"]).save_pretrained(model)
    split = ["--model", model, "--tp", "2"]
    assert "no sharding rule for fft_fftn" in " ".join(succeeds(capsys, "plan", *split, "--save", file).split())
    assert "no sharding rule for fft_fftn" in " ".join(succeeds(capsys, "explain", file).split())
    for words in (["plan", *split], ["verify", *split], ["verify", "--model", model, "--plan", file]):
        assert "strict: no sharding rule for fft_fftn" in fails(capsys, *words, "--strict")
    assert PartitionPlan.load(file).mesh.tp == 2


def test_from_pretrained_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PlanOptions] = []

    def start_rank(source: object, dtype: object, wanted: PlanOptions, *rest: Any, **further: Any) -> Any:
        asked.append(wanted)
        return SimpleNamespace()

    monkeypatch.setattr("autodist_fx.api.from_pretrained.start_rank", start_rank)
    adx.from_pretrained("a checkpoint", tp=2, strict=True)
    adx.from_pretrained("a checkpoint", tp=2)
    assert [wanted.resolve("generic").strict for wanted in asked] == [True, False]

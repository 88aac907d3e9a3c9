"""The parts of benchmarks/coverage.py: tiny configs, results that are kept, the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_coverage import report, results
from model_coverage.build import CannotBuild, build, config_of
from model_coverage.check import check_type, own_plans
from model_coverage.pool import run_jobs
from model_coverage.sweeps import generation, tables
from model_coverage.tasks import TASKS
from model_coverage.verdict import relative_error

MESHES = ["2x1", "1x2"]


@pytest.mark.parametrize(
    "task, class_name, expected",
    [
        ("causal-lm", "LlamaForCausalLM", {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}),
        ("causal-lm", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
        ("causal-lm", "Qwen3NextForCausalLM", {"layer_types": ["linear_attention", "full_attention"]}),
    ],
)
def test_configs_shrink(task: str, class_name: str, expected: dict[str, Any]) -> None:
    config = config_of(getattr(transformers, class_name), task)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.vocab_size % 3 and config.pad_token_id == 0


def test_parts_of_a_config_shrink_too() -> None:
    config = config_of(transformers.Gemma3ForConditionalGeneration, "causal-lm")
    assert config.text_config.hidden_size == config.vision_config.hidden_size == 32
    assert config.vision_config.image_size == 32 and config.text_config.num_key_value_heads == 2


def test_every_parameter_is_random() -> None:
    model = build("causal-lm", "GPT2LMHeadModel")
    assert all(parameter.unique().numel() > 1 for parameter in model.parameters())
    assert model.dtype == torch.float64


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(CannotBuild, match="has no class NoSuchForCausalLM"):
        build("causal-lm", "NoSuchForCausalLM")


@pytest.mark.parametrize(
    "got, expected, error",
    [([1.0, 2.0], [1.0, 4.0], 0.5), ([float("nan")], [1.0], float("inf")), ([1.0, 1.0], [1.0], float("inf"))],
)
def test_relative_error(got: list[float], expected: list[float], error: float) -> None:
    assert relative_error(torch.tensor(got), torch.tensor(expected)) == error


@pytest.mark.slow
def test_a_type_is_checked() -> None:
    result = check_type("causal-lm", "gpt2", [(2, 1)], sweeps=("generation", "calls"))
    assert result["meshes"]["2x1"]["verdict"] == "right" and result["decoding"]["2x1"]["verdict"] == "right"
    assert result["share_sharded"] == 1.0 and result["all_reduces_per_layer"] == 2.0
    assert result["all_gathers_per_layer"] == 0.0
    words = [tables.verdict(entries) for kinds in result["sweeps"].values() for entries in kinds.values()]
    assert words == ["right"] * 10 and len(result["sweeps"]["calls"]["packed"]) == 2  # simulated, and over ranks


def test_a_split_model_that_differs_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_coverage.check.TOLERANCE", {torch.float64: -1.0})
    result = check_type("causal-lm", "gpt2", [(1, 1)])
    assert result["meshes"]["1x1"]["verdict"] == "wrong"


def _result(name: str, verdict: str, **more: Any) -> results.Result:
    entry = {"verdict": verdict, "reason": "it does"}
    meshes = {mesh: entry for mesh in MESHES}
    made = {"task": "causal-lm", "type": name, "class": name.title(), "built": True, "seconds": 1.0, "meshes": meshes}
    return {**made, "share_sharded": 1.0, "all_reduces_per_layer": 2.0, "decoding": meshes, "state": "now", **more}


def test_the_page_counts_and_gives_reasons() -> None:
    found = [
        _result("good", "right"),
        _result("whole", "right", share_sharded=0.2, all_gathers_per_layer=9.5),
        _result("bad", "wrong"),
        _result("no", "refused", share_sharded=None, all_reduces_per_layer=None),
        {"task": "causal-lm", "type": "gone", "class": "Gone", "built": False, "reason": "needs a_b", "seconds": 0.1},
    ]
    page = report.section(found, MESHES, "coverage.py", "now", 60.0, 2)
    assert "build here without extra packages: **4**" in page
    assert "right on 2x1, 1x2: **2**" in page and "per layer: **1**" in page
    assert "- **bad** (2x1, 1x2, KV cache 2x1, KV cache 1x2) wrong: it does" in page  # like reasons, one line
    assert "| 20%     | 2  | 9.5 |" in page and "AG > 2" in page
    assert "- **gone** (Gone): needs a\\_b" in page


def test_a_run_writes_the_section_of_its_version_alone() -> None:
    page = report.page({"4.57.6": "### Totals\n\nold", "5.24.0": "new", "5.9.0": "between"})
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## transformers 5.24.0", "## transformers 5.9.0", "## transformers 4.57.6"
    ]  # fmt: skip
    written = report.sections_of(page)
    assert written == {"4.57.6": "### Totals\n\nold", "5.24.0": "new", "5.9.0": "between"}
    assert report.page(written) == page


def _swept(name: str, generation: str, truth: bool = False) -> results.Result:
    entry = {"verdict": generation, "reason": f"{name} does_so"} | ({"truth": "another"} if truth else {})
    none = {"transformers": {"verdict": "none", "reason": "transformers itself: no"}}
    calls = {"packed": none, "labels": {"simulate 2x1": {"verdict": "right"}, "2x1": entry}}
    return _result(name, "right", sweeps={"generation": {"greedy": {"2x1": entry}}, "calls": calls})


def test_the_page_has_what_users_do() -> None:
    found = [_swept("good", "right"), _swept("other", "right", truth=True), _swept("no", "refused")]
    page = report.section(found, MESHES, "coverage.py", "now", 60.0, 2)
    lines = [" ".join(line.replace("|", " ").split()) for line in page.splitlines()]
    assert "causal-lm generating: greedy 3 1 1 1 0 0" in lines and "causal-lm calls: packed 0 0 0 0 0 0" in lines
    assert "good right - - - - -" in lines and "other right* - - - - -" in lines  # greedy of all ways to generate
    assert "no - - - refused" in lines  # no mask, padded, packed, labels
    assert "- **other** (greedy 2x1): other does\\_so" in lines
    assert "- **no** (generation: greedy 2x1, calls: labels 2x1) refused: no does\\_so" in lines
    assert "- **good** (packed): transformers itself: no" in lines


@torch.no_grad()
def test_tokens_that_differ_are_wrong_unless_they_are_those_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("causal-lm", "GPT2LMHeadModel")
    greedy = next(iter(generation.questions(model, "causal-lm", padded=True)))
    tokens = greedy.ask(model)
    assert tokens.shape == (2, 6) and greedy.judge(tokens) == {"verdict": "right"}
    assert greedy.judge(tokens + 1)["verdict"] == "wrong"
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda use_cache=True, **given: generate(**given) + (not use_cache))
    found = next(iter(generation.questions(model, "causal-lm", padded=True))).judge(tokens + 1)
    assert (found["verdict"], found["truth"]) == ("right", generation.WITHOUT_CACHE)


@pytest.mark.parametrize("class_name, plans", [("LlamaForCausalLM", ["tp", "pp"]), ("GPT2LMHeadModel", [])])
def test_rows_say_which_plans_transformers_has(class_name: str, plans: list[str]) -> None:
    assert own_plans(build("causal-lm", class_name)) == plans


def test_results_are_kept_with_the_state_of_the_code(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    results.append(path, _result("a", "wrong", state="before"))
    results.append(path, _result("a", "right"))
    results.append(path, _result("b", "right", state="before"))
    path.write_text(path.read_text() + '{"task": "causal-lm", "ty')  # interrupted
    known = results.read(path)
    assert known["causal-lm", "a"]["meshes"]["2x1"]["verdict"] == "right"
    assert [key[1] for key in results.usable(known.values(), MESHES, "now")] == ["a"]
    assert [key[1] for key in results.usable(known.values(), MESHES, None)] == ["a", "b"]
    assert not results.usable(known.values(), ["3x1"], None)
    swept = results.swept(["calls"], ["2x1"])
    assert not results.usable(known.values(), MESHES, None, swept)
    results.append(path, _result("b", "right", swept=swept))
    assert [key[1] for key in results.usable(results.read(path).values(), MESHES, None, swept)] == ["b"]


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_is_replaced() -> None:
    """Too little time for the first type, and enough for the next."""
    done: list[results.Result] = []
    job = {"task": "causal-lm", "type": "gpt2", "class": "GPT2LMHeadModel", "meshes": [(2, 1)], "seconds": 60.0}
    job |= {"sweeps": [], "sweep_meshes": [(2, 1)]}
    run_jobs([job], 1, 0.0, 4 << 30, lambda started: None, done.append)
    run_jobs([job], 1, 100.0, 4 << 30, lambda started: None, done.append)
    assert [result["meshes"]["2x1"]["verdict"] for result in done] == ["crashed", "right"]
    assert set(TASKS) >= {result["task"] for result in done}

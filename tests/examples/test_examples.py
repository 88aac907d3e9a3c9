"""The scripts in examples/ do what they say: each is run as it stands, on a tiny model, and compared with one process.

Those that need packages which `make test` has not are run by `make libraries`: evaluate.py, and the server
(tests/libraries/run_server.py).
"""

import ast
import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from cost_model.partition_plan import PartitionPlan
from cost_model.rules.table import RULES
from passes.op_graph.table import HANDLERS
from tests.support.checkpoint import save_tiny
from tests.support.forked import on_processes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MOST_LINES = 60


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    logging.set_verbosity_error()
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [{"text": " ".join(f"w{3 + (row + n) % 9}" for n in range(5 + row))} for row in range(4)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(name, *arguments):
    """Returns what the script prints, which is run in this process as if it was called by its name."""
    output, argv = io.StringIO(), sys.argv
    sys.argv = [str(EXAMPLES / name), *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = argv
    return output.getvalue()


def test_they_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.rglob("*.py")}
    assert len(lengths) == 10 and max(lengths.values()) < MOST_LINES, lengths


@pytest.mark.distributed
def test_generate(llama):
    prompt = "w5 w6 w7"
    arguments = (llama, "--tp", 2, "--prompt", prompt, "--max-new-tokens", 4)
    said = on_processes(2, lambda rank: run("generate.py", *arguments))
    tokens = AutoTokenizer.from_pretrained(llama)(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(llama).generate(**tokens, max_new_tokens=4, do_sample=False)
    made = whole[0, 3:].tolist()
    for rank, text in enumerate(said):
        assert f"rank {rank} of 2: {len(made)} tokens {made}" in text, text
    assert said[0].startswith(prompt) and prompt not in said[1]


def test_fine_tune(llama, texts, tmp_path):
    run("fine_tune.py", llama, texts, "--tp", 2, "--out", tmp_path / "tuned", "--max-steps", 3, "--simulate")
    text = json.loads(texts.read_text().splitlines()[0])["text"]
    ids = AutoTokenizer.from_pretrained(llama)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path)(ids, labels=ids).loss.item()
            for path in (llama, tmp_path / "tuned")
        )
    assert after < before


def test_lora(llama, texts, tmp_path):
    peft = pytest.importorskip("peft")
    said = run("lora.py", llama, texts, "--pp", 1, "--tp", 2, "--out", tmp_path, "--steps", 4, "--simulate")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+),", said)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path)
    changed = [p for name, p in adapted.named_parameters() if "lora_B" in name and bool(p.any())]
    assert len(changed) == 2  # they begin at zero


def test_choose_mesh(llama, tmp_path):
    said = run("choose_mesh.py", llama, "--devices", 2, "--out", tmp_path / "plan.json")
    assert said.count("tp=1 x pp=2") >= 3 and "trained on 2 h100" in said
    assert PartitionPlan.load(tmp_path / "plan.json").hardware == "h100"


def test_op_rule(monkeypatch):
    for table in (RULES, HANDLERS):
        monkeypatch.setitem(table, "logcumsumexp", None)  # taken out again at the end
        monkeypatch.delitem(table, "logcumsumexp")
    said = run("op_rule.py")
    assert "no sharding rule for logcumsumexp (op_rule.py:" in said
    without, with_rule = (ast.literal_eval(text) for text in re.findall(r"rule +(\{.*\})", said))
    assert with_rule == {**without, "all_gather": without["all_gather"] - 1}
    assert float(re.search(r"whole model: (\S+)", said)[1]) < 1e-6


def test_custom_pass():
    torch.manual_seed(0)
    said = run("custom_pass.py")
    assert "2 all_reduces in bfloat16" in said and "'all_reduce of bfloat16[2, 6, 64]': 2" in said
    difference, largest = map(float, re.search(r"differ by (\S+) of (\S+)", said).groups())
    assert 0 < difference < 0.02 * largest


def test_evaluate(llama, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text('{"a": "w5 w6", "b": "w7"}\n{"a": "w8 w9", "b": "w10"}\n')
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{a}}'\ndoc_to_target: ' {{b}}'\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
    )
    said = run("evaluate.py", llama, "--tasks", "tiny", "--include-path", tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    likely = []
    for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()):
        ids = tokenizer(f"{row['a']} {row['b']}", return_tensors="pt").input_ids
        with torch.no_grad():
            likely.append(model(ids[:, :-1]).logits[0, -1].log_softmax(-1)[ids[0, -1]])
    wanted = torch.stack(likely).mean().neg().exp().item()
    assert any(abs(float(number) - wanted) < 1e-3 * wanted for number in re.findall(r"\d+\.\d+", said)), said

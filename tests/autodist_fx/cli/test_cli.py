"""The command line: what it prints, and errors of one line with exit code 2."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from autodist_fx.cli.main import main
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import agree
from cost_model.errors import VerificationError
from cost_model.partition_plan import PartitionPlan
from tests.support.checkpoint import save_tiny
from tests.support.command_line import fails, succeeds

RUN = ("--prompt", "w5 w6", "--max-new-tokens", "4")


@pytest.mark.parametrize("command", [("plan",), ("verify",), ("run", *RUN)])
def test_unknown_model(capsys, command):
    assert "there is no file or directory /nowhere/model" in fails(capsys, *command, "--model", "/nowhere/model")


@pytest.mark.parametrize("tp", [1, 2])
def test_a_directory_without_weights(capsys, config_only, tp):
    assert "has no weights: expected model.safetensors" in fails(
        capsys, "run", "--model", config_only, "--tp", tp, *RUN
    )


@pytest.mark.parametrize("command", [("plan",), ("run", *RUN)])
def test_more_stages_than_cuts(capsys, llama, command):
    assert "pp=99 needs 98 cuts, but the model has only" in fails(capsys, *command, "--model", llama, "--pp", 99)


def test_a_device_that_is_not_there(capsys, llama, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = fails(capsys, "run", "--model", llama, "--tp", 2, "--pp", 2, "--device", "cuda", *RUN)
    assert "no CUDA device is visible (CUDA_VISIBLE_DEVICES=3): use device cpu" in error


def test_another_world_size_under_torchrun(capsys, llama, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")  # of more, each waits for the others, to tell them what is wrong
    error = fails(capsys, "run", "--model", llama, "--tp", 2, *RUN)
    assert "tp=2 x pp=1 needs 2 processes, and 1 was started: use `torchrun --nproc-per-node 2`" in error


def test_a_plan_for_another_model(capsys, llama, tmp_path):
    other = save_tiny(tmp_path / "other", "llama", num_hidden_layers=3)
    saved = tmp_path / "plan.json"
    succeeds(capsys, "plan", "--model", other, "--tp", 2, "--save", saved)
    assert "the plan is for another graph" in fails(capsys, "run", "--model", llama, "--plan", saved, *RUN)
    error = fails(capsys, "run", "--model", other, "--plan", saved, "--tp", 1, *RUN)
    assert "the plan is for tp=2 x pp=1, and tp=1 x pp=1 was asked for" in error
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json" in fails(capsys, "plan", "--model", llama, "--plan", tmp_path / "broken.json")


def test_run_refuses_missing_and_empty_prompts(capsys, llama, tmp_path):
    assert "give either --prompt TEXT or --batch-file" in fails(capsys, "run", "--model", llama)
    (tmp_path / "empty").write_text("\n\n")
    assert "holds no prompt" in fails(capsys, "run", "--model", llama, "--batch-file", tmp_path / "empty")
    assert "the prompt is empty" in fails(capsys, "run", "--model", llama, "--prompt", "")


def test_other_mistakes(capsys, llama):
    assert "no dtype 'int8'" in fails(capsys, "plan", "--model", llama, "--dtype", "int8")
    assert "abacus" in fails(capsys, "plan", "--model", llama, "--hardware", "abacus")
    assert "add --rank" in fails(capsys, "run", "--model", llama, "--world-size", 2, *RUN)
    assert "where do the ranks meet" in fails(
        capsys, "run", "--model", llama, "--tp", 2, "--rank", 0, "--world-size", 2, *RUN
    )


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--tp", "0", "0 is less than 1"),
        ("--top-p", "7", "7 is not between 0 and 1"),
        ("--temperature", "0", "0 is not above 0"),
        ("--timeout", "-3", "-3 is not above 0"),
        ("--timeout", "nan", "nan is not above 0"),
        ("--seed", "-1", "-1 is less than 0"),
        ("--master-port", "65536", "65536 is more than 65535"),
        ("--no-such", "x", "unrecognized arguments: --no-such x"),
    ],
)
def test_a_value_out_of_its_range_is_one_line(capsys, option, value, said):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--model", "x", option, value])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and printed.startswith("autodist-fx") and said in printed


def test_ctrl_c_is_told_to_the_other_ranks(monkeypatch):
    told = []
    monkeypatch.setattr("autodist_fx.cli.run.run", lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("autodist_fx.runtime.comm.process_group.leave", lambda failure, is_said: told.append(failure))
    assert main(["run", "--model", "x", "--prompt", "x"]) == 130
    assert told == ["ended by Ctrl-C"]


def test_options_that_an_artifact_has_settled_are_refused(capsys, llama, tmp_path):
    succeeds(capsys, "compile", "--model", llama, "--tp", 2, "--out", tmp_path / "split")
    for option, value in (("--dtype", "bfloat16"), ("--pin", "*.q_proj=replicate"), ("--dump-dir", tmp_path)):
        error = fails(capsys, "run", "--artifact", tmp_path / "split", option, value, *RUN)
        assert f"leave {option} out" in error


def test_a_device_by_number_is_one_ranks(capsys, llama):
    error = fails(capsys, "run", "--model", llama, "--tp", 2, "--device", "cuda:1", *RUN)
    assert "--device cuda:1 is one rank's: add --rank" in error


def test_errors_of_the_models_own_code_are_one_line(capsys, tmp_path):
    gpt2 = save_tiny(tmp_path / "gpt2", "gpt2")  # with a table of 64 positions
    long = " ".join(["w5"] * 70)
    error = fails(capsys, "run", "--model", gpt2, "--prompt", long, "--max-new-tokens", 2, "--device", "cpu")
    assert "holds 64, and transformer.wpe has 64 rows: 0 to 63 are allowed" in error


def test_plan_from_a_config_alone(capsys, config_only, tmp_path):
    saved = tmp_path / "plan.json"
    printed = succeeds(capsys, "plan", "--model", config_only, "--tp", 2, "--pp", 2, "--save", saved)
    assert "LlamaForCausalLM on tp=2 x pp=2 (4 ranks of cpu-gloo)" in printed
    plan = PartitionPlan.load(saved)
    assert str(plan) + "\n" == printed
    as_json = succeeds(capsys, "plan", "--model", config_only / "config.json", "--tp", 2, "--pp", 2, "--json")
    assert PartitionPlan.from_dict(json.loads(as_json)) == plan
    on_h100 = succeeds(capsys, "plan", "--model", config_only, "--tp", 2, "--hardware", "h100", "--batch", 8)
    assert "h100" in on_h100 and "B=8" in on_h100


def test_verify_and_graph_diff(capsys, config_only):
    assert "the programs of 4 ranks made and verified" in succeeds(
        capsys, "verify", "--model", config_only, "--tp", 2, "--pp", 2
    )
    diff = succeeds(capsys, "graph-diff", "--model", config_only, "--tp", 2, "--rank", 1)
    assert any(line.startswith("+") and "all_reduce" in line for line in diff.splitlines())
    assert "rank 1 of tp=2 x pp=1" in diff


def test_run_alone_as_json(capsys, llama, tmp_path):
    (tmp_path / "prompts").write_bytes("\ufeffw5 w6\u2028w7\r\n \r\nw9".encode())  # as some editors write it
    keywords = ("--model", llama, "--max-new-tokens", 6, "--json", "--no-do-sample", "--device", "cpu")
    result = json.loads(succeeds(capsys, "run", *keywords, "--batch-file", tmp_path / "prompts"))
    model = AutoModelForCausalLM.from_pretrained(llama)
    ids, mask = torch.tensor([[5, 6, 7], [0, 0, 9]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 3:].tolist()
    for answer, wanted in zip(result["answers"], expected, strict=True):
        assert answer["token_ids"] == wanted[: len(answer["token_ids"])]
        assert answer["text"] == " ".join(f"w{token}" for token in answer["token_ids"] if token > 2)
    assert [answer["prompt_tokens"] for answer in result["answers"]] == [3, 1]
    assert (result["tp"], result["pp"], result["dtype"]) == (1, 1, "float32")
    assert result["timings"]["time_to_first_token_seconds"] > 0
    assert result["timings"]["tokens_per_second"] > 0


def test_beams_of_the_checkpoints_own_generation_config_are_printed(capsys, llama, tmp_path):
    checkpoint = shutil.copytree(llama, tmp_path / "beams")
    (checkpoint / "generation_config.json").write_text(json.dumps({"num_beams": 2, "pad_token_id": 0}))
    printed = succeeds(capsys, "run", "--model", checkpoint, *RUN, "--device", "cpu")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    wanted = model.generate(torch.tensor([[5, 6]]), max_new_tokens=4)[0, 2:].tolist()
    assert " ".join(f"w{token}" for token in wanted) in printed.splitlines()


def test_a_model_that_does_not_generate(capsys, llama, tmp_path):
    checkpoint = shutil.copytree(llama, tmp_path / "scores")
    fields = json.loads((checkpoint / "config.json").read_text())
    fields["architectures"] = ["LlamaForSequenceClassification"]
    (checkpoint / "config.json").write_text(json.dumps(fields))
    error = fails(capsys, "run", "--model", checkpoint, *RUN, "--device", "cpu")
    assert "LlamaForSequenceClassification does not generate" in error


def test_run_streams_and_samples(capsys, llama):
    keywords = ("run", "--model", llama, *RUN, "--seed", 7, "--temperature", 1.5, "--device", "cpu")
    first, second = (succeeds(capsys, *keywords).splitlines() for _ in range(2))
    assert first[0] == second[0] and first[0].startswith("w")
    assert "first token after" in first[-1] and "tokens/s" in first[-1]


def agreed(facts, checks):
    """Returns what `agree` raises on each rank, in threads that hear each other's texts."""
    texts, barrier = {}, threading.Barrier(len(facts))

    def on_rank(rank):
        def everyone(text):
            texts[rank] = text
            barrier.wait(10)
            heard = [texts[other] for other in range(len(facts))]
            barrier.wait(10)
            return heard

        try:
            agree(everyone, rank, facts[rank], check=checks[rank])
        except AutodistError as error:
            return error
        return None

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(on_rank, range(len(facts))))


def test_ranks_that_planned_differently_are_named():
    errors = agreed([{"the plan": "a plan"}, {"the plan": "another plan"}], [None, None])
    assert all("the plan is a plan on rank 0, and another plan on rank 1" in str(error) for error in errors), errors
    assert agreed([{"the plan": "a plan"}] * 2, [lambda: None] * 2) == [None, None]


def test_a_failed_verification_reaches_every_rank():
    def check():
        raise VerificationError("recv_3 has no send")

    for error in agreed([{"the plan": "a plan"}] * 2, [check, check]):
        assert isinstance(error, VerificationError) and "recv_3" in str(error)

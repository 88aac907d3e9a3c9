"""The real lm-eval, sentence-transformers and TRL, over models that are split: `make libraries`.

Each line is a library, and what of it was compared with the unsplit model; the exit code is 1 where one differs. These
are no tests of the suite, since they need many packages more (requirements.txt), which lie in a folder of their own and
leave torch and transformers alone; what they touch is tested by tests/autodist_fx/runtime/test_libraries.py.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel
from trl import SFTConfig, SFTTrainer

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from cost_model.mesh import Mesh
from tests.support.checkpoint import save_tiny
from tests.support.ranks import on_ranks

TP2 = Mesh(tp=2)


def evaluated(model: Any, tokenizer: Any) -> tuple[list[float], list[bool], list[str], int]:
    """lm-eval's three kinds of requests, and the number of parameters that it reports."""
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    pairs = (("w5 w6", " w7 w8"), ("w9", " w10"), ("w11 w12 w13", " w3"))
    likely = harness.loglikelihood([_asked("loglikelihood", pair) for pair in pairs], disable_tqdm=True)
    rolling = harness.loglikelihood_rolling([_asked("loglikelihood_rolling", ("w5 w6 w7",))], disable_tqdm=True)
    until = [(prompt, {"until": ["w77"], "max_gen_toks": 4}) for prompt in ("w5 w6", "w9 w3 w4")]
    texts = harness.generate_until([_asked("generate_until", each) for each in until], disable_tqdm=True)
    numbers = [*(value for value, _ in likely), *rolling]
    return numbers, [greedy for _, greedy in likely], texts, harness.get_model_info()["model_num_parameters"]


def _asked(kind: Any, arguments: tuple[Any, ...]) -> Instance:
    return Instance(kind, {}, arguments, 0)


def lm_eval(directory: Path) -> bool:
    """HFLM over two ranks."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    numbers, *others = evaluated(model, tokenizer)
    found = on_ranks(model, TP2, lambda split: evaluated(split, tokenizer))
    return all(rest == others and torch.allclose(torch.tensor(n), torch.tensor(numbers)) for n, *rest in found)


class Simulated(nn.Module):
    """A split model where a library has an encoder: all of its ranks run in this process."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.compiled, self.config = adx.compile(model, tp=2), model.config

    def forward(self, **inputs: Any) -> Any:
        return self.compiled.simulate(**inputs)


def sentence_transformers(directory: Path) -> bool:
    """Sentence embeddings of padded batches, by an encoder that is split in this process."""
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    encoder = directory.parent / "encoder"
    BertModel(BertConfig(vocab_size=128, **sizes)).save_pretrained(encoder)
    AutoTokenizer.from_pretrained(directory).save_pretrained(encoder)
    embedder = SentenceTransformer(str(encoder), device="cpu")
    texts = ["w5 w6 w7", "w8", "w9 w10 w11 w12"]
    wanted = embedder.encode(texts, convert_to_tensor=True)
    try:
        adx.compile(embedder, tp=2)
        return False
    except AutodistError as error:
        path = str(error).rpartition("give its module ")[2]
    parent, _, name = path.rpartition(".")
    setattr(embedder.get_submodule(parent), name, Simulated(embedder.get_submodule(path)))
    return torch.allclose(embedder.encode(texts, convert_to_tensor=True), wanted, atol=1e-5)


def trl(directory: Path) -> bool:
    """A trainer is told in one line, on every rank, that ranks are not trained."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    options: dict[str, Any] = {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False}

    def told(split: Any) -> str:
        rows, folder = Dataset.from_list([{"text": "w5 w6 w7"}] * 2), str(directory.parent / f"out{split.rank}")
        try:
            SFTTrainer(split, SFTConfig(folder, **options), train_dataset=rows, processing_class=tokenizer).train()
        except AutodistError as error:
            return str(error)
        return ""

    lines = on_ranks(model, TP2, told)
    print(f"   TRL is told: {lines[0]}")
    return all(line == lines[0] and line and "\n" not in line for line in lines)


class SplitSFT(adx.EngineTrainer, SFTTrainer):
    """TRL's trainer over an engine."""


def trl_over_an_engine(directory: Path) -> bool:
    """SFTTrainer with an adapter, over tp=2: losses, evaluations and token accuracy of these as in one process."""
    tokenizer, curves = AutoTokenizer.from_pretrained(directory), []
    texts = [" ".join(f"w{3 + (7 * row + n) % 90}" for n in range(4 + row % 5)) for row in range(16)]
    rows = Dataset.from_list([{"text": text} for text in texts])
    options: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 2, "report_to": "none", "use_cpu": True,
        "bf16": False, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    for kind, mesh in ((SFTTrainer, {}), (SplitSFT, {"tp": 2, "simulate": True})):
        torch.manual_seed(0)
        trainer = kind(
            model=AutoModelForCausalLM.from_pretrained(directory), processing_class=tokenizer, train_dataset=rows,
            args=SFTConfig(str(directory.parent / kind.__name__), **options), eval_dataset=rows,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"), **mesh,
        )  # fmt: skip
        trainer.train()
        names = ("loss", "grad_norm", "eval_loss", "eval_mean_token_accuracy")
        curves.append([line[name] for line in trainer.state.log_history for name in names if name in line])
    return len(curves[0]) == 12 and torch.allclose(*map(torch.tensor, curves), atol=1e-4)


def main() -> int:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    checks: tuple[Callable[[Path], bool], ...] = (lm_eval, sentence_transformers, trl, trl_over_an_engine)
    right = []
    with tempfile.TemporaryDirectory() as folder:
        directory = save_tiny(Path(folder) / "model", "llama", num_hidden_layers=1)
        for check in checks:
            right.append(check(directory))
            print(f"{'right' if right[-1] else 'WRONG'}  {check.__name__}: {check.__doc__}", flush=True)
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())

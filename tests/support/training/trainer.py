"""Data, arguments and notes for tests of transformers' Trainer over an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

ROWS, TOKENS, BATCH = 20, 8, 4


class Texts(Dataset):
    """Token ids, padded by another number in each row, and their labels."""

    def __init__(self, rows: int = ROWS) -> None:
        self.ids = torch.randint(3, 90, (rows, TOKENS), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(TOKENS) < TOKENS - row % 4).long()
        ids = self.ids[row]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Notes(TrainerCallback):
    """Notes what is logged: loss, norm and learning rate of each step, and the loss of evaluations."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[float, float, float]] = {}
        self.evaluations: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.steps[state.global_step] = (logs["loss"], float(logs["grad_norm"]), logs["learning_rate"])
        if "eval_loss" in logs:
            self.evaluations[state.global_step] = logs["eval_loss"]


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
        "learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 2, "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.5, "logging_steps": 1, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    return TrainingArguments(str(directory), **{**given, **changes})

"""`Trainer`: transformers.Trainer whose model is split over a mesh; `EngineTrainer`, the same for its subclasses."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.trainer_callback import ExportableState

from autodist_fx.api.train import train
from autodist_fx.compiler.peft import without_wrapper
from autodist_fx.errors import AutodistError, CheckpointError
from autodist_fx.trainer.engine_model import EngineModel
from autodist_fx.trainer.learning_rates import LearningRates
from autodist_fx.trainer.one_process import as_one_process
from autodist_fx.trainer.random_state import random_states, set_random_states
from autodist_fx.trainer.refusals import refuse_arguments, refuse_own_losses
from autodist_fx.training.checkpoint.plain import from_plain, to_plain
from autodist_fx.training.engine import Engine, StepResult

_RUN, _STATE = "engine", "trainer_state.json"  # in a checkpoint's directory: the engine's run, the Trainer's state


if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object  # the subclass brings the Trainer


class EngineTrainer(_Base):
    """Makes a subclass of transformers.Trainer train by an engine: `class SFT(EngineTrainer, SFTTrainer)`.

    Arguments beside the Trainer's own are those of `autodist_fx.train`: tp, pp, dp, schedule, microbatches, simulate,
    ... A step is `gradient_accumulation_steps` batches of `per_device_train_batch_size * dp` rows; each batch is dealt
    to the replicas, and cut into `microbatches` (by default 1, or pp where fewer batches than stages are accumulated).
    Every rank is given all data. TrainingArguments mean what they mean to transformers in one process; what cannot is
    refused by name; gradient_checkpointing is recompute="layers". Checkpoints have the model as from_pretrained reads
    it, and the engine's run, for any mesh.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *more: Any, tp: int = 1, pp: int = 1, dp: int = 1, **keywords: Any
    ) -> None:
        options = {name: keywords.pop(name) for name in tuple(keywords) if name in _TRAIN_OPTIONS}
        self._mesh_options = {"tp": tp, "pp": pp, "dp": dp, **options}
        if args is None:
            args = transformers.TrainingArguments(output_dir="tmp_trainer")
        self._rank = 0 if options.get("simulate") else int(options.get("rank") or os.environ.get("RANK") or 0)
        as_one_process(args)
        self.optimizer: Any
        self._engine: Engine | None = None
        self._rates: LearningRates | None = None
        self._batches: list[dict[str, Any]] = []
        self._result = StepResult(0, 0.0, 0.0)
        self._random_states: dict[str, Any] | None = None
        super().__init__(model, args, *more, **keywords)
        refuse_arguments(self.args, self.model)
        refuse_own_losses(self)
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise AutodistError("optimizers are of whole parameters: give optim=, or optimizer_cls_and_kwargs=")
        self._engine_model = EngineModel(lambda: self.engine, self.model)
        self._train_batch_size = self.args.train_batch_size * dp

    @property
    def engine(self) -> Engine:
        """The engine, made at first use."""
        if self._engine is None:
            self.create_optimizer()
        assert self._engine is not None
        return self._engine

    # -- what transformers' loop calls --------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # the loop clips here, when the engine has done so
        self.accelerator.clip_grad_norm_ = lambda *_, **__: torch.tensor(self._result.grad_norm)

    def is_world_process_zero(self) -> bool:
        return self._rank == 0

    def is_local_process_zero(self) -> bool:
        return self._rank == 0

    def create_optimizer(self, *_: Any, **__: Any) -> Any:
        if self._engine is not None:
            return self.optimizer
        given = getattr(self, "optimizer_cls_and_kwargs", None)
        kind, options = given or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        model = without_wrapper(self.model)
        self._rates = LearningRates(
            kind, options, self.args.weight_decay, self.get_decay_parameter_names(model)
        )
        mesh, accumulated = dict(self._mesh_options), self.args.gradient_accumulation_steps
        mesh.setdefault("microbatches", 1 if accumulated >= mesh["pp"] else mesh["pp"])
        if self.args.gradient_checkpointing:
            mesh.setdefault("recompute", "layers")
            model.gradient_checkpointing_disable()  # transformers' own way of it, in the model's Python
        clip = self.args.max_grad_norm
        self._engine = train(
            self.model, **mesh, optimizer=self._rates, max_grad_norm=clip if clip and clip > 0 else None,
            seed=self.args.seed,
        )  # fmt: skip
        self.optimizer = self._rates.seen
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None, *_: Any) -> torch.Tensor:
        """Collect a batch; with the last one that is accumulated, take the engine's step, and return its loss."""
        model.train()
        self._batches.append(dict(inputs))
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            self._batches[-1]["num_items_in_batch"] = torch.as_tensor(num_items_in_batch)
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.tensor(0.0)
        batches, self._batches = self._batches, []
        assert self._rates is not None
        self._rates.follow()
        self._result = self.engine.step(batches)
        return torch.tensor(self._result.loss, dtype=torch.get_default_dtype())

    def _wrap_model(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return self._engine_model

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model for from_pretrained, and the tokenizer beside it."""
        directory = self.args.output_dir if output_dir is None else output_dir
        self.engine.save_pretrained(directory)
        if self._rank == 0 and self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        if self.args.push_to_hub and not _internal_call and self._rank == 0:
            self.push_to_hub(commit_message="Model save")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, and put it there when it is whole."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run = Path(self._get_output_dir(trial=trial))
        target, scratch = (run / f"{prefix}checkpoint-{self.state.global_step}" for prefix in ("", "tmp-"))
        if self._rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        self.save_model(str(scratch), _internal_call=True)
        best = run / f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
        if best is not None and (best.exists() or best == target):
            self.state.best_model_checkpoint = str(best)
        if not self.args.save_only_model:
            assert self._rates is not None
            self._rates.follow()
            scheduler = to_plain(self.lr_scheduler.state_dict(), "the state of the scheduler of learning rates")
            rates = [float(group["lr"]) for group in self._rates.seen.param_groups]
            data = {"scheduler": scheduler, "learning_rates": rates, "random_states": random_states()}
            self.engine.save(scratch / _RUN, data=data)
        if self._rank == 0:
            self._note_callbacks()
            self.state.save_to_json(str(scratch / _STATE))
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(target))
            self._rotate(run)
        self.engine.meet()

    def _note_callbacks(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                if isinstance(self.state.stateful_callbacks.get(name), list):
                    self.state.stateful_callbacks[name].append(state)
                else:
                    self.state.stateful_callbacks[name] = state

    def _rotate(self, run: Path) -> None:
        """Remove checkpoints, the oldest first, until save_total_limit are left; the best one stays."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if not limit or limit < 1:
            return
        numbered = [(int(p.name.rpartition("-")[2]), p) for p in run.glob("checkpoint-*") if p.name[11:].isdecimal()]
        kept = [path for _, path in sorted(numbered)]
        old = [path for path in kept[:-1] if best is None or path != Path(best)]
        for path in old[: max(0, len(kept) - limit)]:
            shutil.rmtree(path, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing yet: the run is loaded when the engine is there (_load_optimizer_and_scheduler)."""
        if not (Path(resume_from_checkpoint) / _RUN).is_dir():
            raise CheckpointError(
                f"{resume_from_checkpoint} holds no run of an engine: it was written by another trainer, or with "
                "save_only_model; train from it as a model"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        data = self.engine.load(Path(checkpoint) / _RUN).data
        self.lr_scheduler.load_state_dict(from_plain(data["scheduler"]))
        assert self._rates is not None
        for group, rate in zip(self._rates.seen.param_groups, data["learning_rates"], strict=True):
            group["lr"] = rate
        self._random_states = data["random_states"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._random_states is not None:
            set_random_states(self._random_states)

    def _load_best_model(self) -> None:
        self.engine.load(Path(self.state.best_model_checkpoint) / _RUN)


class Trainer(EngineTrainer, transformers.Trainer):
    __doc__ = EngineTrainer.__doc__


_TRAIN_OPTIONS = frozenset(
    {
        "schedule", "microbatches", "stages_per_rank", "zero_stage", "master_weights", "recompute", "simulate",
        "hardware", "objective", "pin", "cuts", "max_memory", "device_map", "plan", "strict", "verify", "dump_dir",
        "device", "timeout", "rank", "world_size", "master_addr", "master_port",
    }
)  # fmt: skip

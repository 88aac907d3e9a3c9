"""Names what of transformers' Trainer an engine does not do."""

from __future__ import annotations

import transformers
from transformers import PreTrainedModel, TrainingArguments

from autodist_fx.errors import AutodistError

# Subclasses whose compute_loss gives the model's own loss, and measures beside it.
_OWN_LOSS = ("trl.trainer.sft_trainer",)


def refuse_arguments(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Raise AutodistError, which names the argument and the way out, for one that would not mean what it means."""
    deepspeed, fsdp = getattr(args, "deepspeed", None), getattr(args, "fsdp", None)
    is_16_bit = next(model.parameters()).dtype.itemsize == 2
    bfloat16 = "load the model with dtype=torch.bfloat16, whose steps are taken in float32"
    found = {
        "deepspeed": (deepspeed, "the engine has replicas (dp=) and splits the model itself"),
        "fsdp": (fsdp, "the engine has replicas (dp=) and splits the model itself"),
        "fp16": (args.fp16, "load the model in bfloat16, which needs no loss scaling"),
        "bf16": (args.bf16 and not is_16_bit, bfloat16),
        "torch_compile": (args.torch_compile, "the engine's programs are graphs already"),
        "label_smoothing_factor": (args.label_smoothing_factor, "the engine trains by the loss that the model returns"),
        "neftune_noise_alpha": (args.neftune_noise_alpha, "its noise is drawn by a hook, on one device"),
        "auto_find_batch_size": (args.auto_find_batch_size, "give per_device_train_batch_size"),
        "use_liger_kernel": (args.use_liger_kernel, "its kernels have no sharding rules"),
    }
    for name, (value, way_out) in found.items():
        if value:
            raise AutodistError(f"TrainingArguments({name}={value!r}) is not for a split model: {way_out}")


def refuse_own_losses(trainer: transformers.Trainer) -> None:
    """Raise AutodistError for a loss that is computed outside of the model."""
    if trainer.compute_loss_func is not None:
        raise AutodistError("compute_loss_func computes a loss outside of the model, by whose own loss it is trained")
    for kind in type(trainer).__mro__:
        if "compute_loss" in vars(kind):
            if kind is not transformers.Trainer and kind.__module__ not in _OWN_LOSS:
                raise AutodistError(
                    f"{kind.__name__}.compute_loss computes a loss outside of the model, whose own loss the engine "
                    "trains by: put it into the model's forward"
                )
            return

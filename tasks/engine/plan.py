"""What a training run is made of: rows, loss, settings; and the loss of a model under them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from tasks.core.job import Job
from tasks.core.training import TrainingConfig
from tasks.engine.batches import Batch, collate, micro_batch, to_device
from tasks.engine.chat import Example
from tasks.engine.load import pick_dtype

# Sums over a batch's labels: "loss" with its gradient, and further parts by name ("kd_loss", "ce_loss").
Objective = Callable[[PreTrainedModel, Batch], dict[str, Tensor]]
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


@dataclass
class Plan:
    """Everything that decides a run.

    `build` makes the untrained model (again, after a divergence); `validation` are rows after the training rows, in
    the numbering that `objective` sees; `made_by` is a fingerprint of config, rows and models, so that no other
    run's checkpoint is continued.
    """

    build: Callable[[], PreTrainedModel]
    examples: Sequence[Example]
    validation: Sequence[Example]
    objective: Objective
    config: TrainingConfig
    job: Job
    made_by: str

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        asked = math.ceil(len(self.examples) * self.config.epochs / self.config.batch_size)
        return self.config.max_steps or max(1, asked)

    @property
    def micro_batch(self) -> int:
        """Rows in memory at once, after the out-of-memory retries so far."""
        return micro_batch(self.config.batch_size, self.config.micro_batch_size, self.job.rung)

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints are."""
        return self.job.work / "checkpoints"


def validation_losses(plan: Plan, model: PreTrainedModel) -> dict[str, float]:
    """Mean losses per label token over the validation rows; empty when there are none or a stop was asked for."""
    sums: dict[str, Tensor] = {}
    labels, first, done = 0, len(plan.examples), 0
    order = sorted(range(len(plan.validation)), key=lambda row: len(plan.validation[row].input_ids))
    training = model.training
    model.train(False)
    while done < len(order) and not plan.job.stop_requested:
        rows = order[done : done + plan.micro_batch]
        batch = collate([(first + row, plan.validation[row]) for row in rows])
        with torch.no_grad():
            parts = loss_sums(plan, model, to_device(batch, model.device))
        sums = {name: sums[name] + value if sums else value for name, value in parts.items()}
        labels, done = labels + len(batch["labels"]), done + len(rows)
        if done % (16 * plan.micro_batch) == 0 or done == len(order):
            plan.job.progress(done, len(order), "validation rows")
    model.train(training)
    return {name: float(value) / labels for name, value in sums.items()} if done == len(order) else {}


def loss_sums(plan: Plan, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """The objective with matrices multiplied in the config's precision; parameters keep theirs."""
    device = batch["input_ids"].device.type
    dtype = pick_dtype(plan.config.precision, device)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return plan.objective(model, batch)


def training_arguments(plan: Plan, scale: float, device: str) -> TrainingArguments:
    """transformers' settings for a plan, with `scale` of its learning rate. Saving and telling are Reporter's."""
    config = plan.config
    arguments = TrainingArguments(
        output_dir=str(plan.checkpoints),
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=config.batch_size // plan.micro_batch,
        max_steps=plan.steps,
        learning_rate=config.learning_rate * scale,
        lr_scheduler_type="constant_with_warmup" if config.scheduler == "constant" else config.scheduler,
        warmup_steps=math.ceil(config.warmup_ratio * plan.steps),
        optim=OPTIMIZERS[config.optimizer],
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=device == "cpu",
        logging_strategy="no",  # Reporter tells, by time
        logging_nan_inf_filter=False,
        save_strategy="no",  # Reporter asks for checkpoints
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several cards are torchrun's business, not DataParallel's
    return arguments

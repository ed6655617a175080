"""Specification of a training run: model, rows, objective, settings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.memory_fallback import micro_batch
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import Batch
from tasks.engine.distributed import ranks
from tasks.engine.losses.loss_sums import LossSums
from tasks.engine.models.dtypes import pick_dtype
from tasks.engine.training.history import History
from tasks.engine.training.objective import Objective
from tasks.engine.training.weight_swap import WeightSwap


@dataclass
class TrainingSpec:
    """Everything that decides a training run; `config` is resolved (tasks.engine.training.resolve)."""

    build: Callable[[], PreTrainedModel]
    """Makes the untrained model; called again after a divergence."""
    examples: Sequence[Example]
    """Training rows."""
    validation: Sequence[Example]
    """Validation rows, numbered on from the training rows in `Batch["rows"]`."""
    objective: Objective
    config: TrainingConfig
    job: Job
    fingerprint: str
    """Digest of config, rows and models: only checkpoints of the same fingerprint are resumed."""
    weight_swap: Callable[[PreTrainedModel], WeightSwap] | None = None
    """Makes the weights that the loss sees in place of the trained ones."""
    strategy: ranks.Strategy = "ddp"
    """What several processes shard."""
    prepare_batch: Callable[[Batch], Batch] | None = None
    """Adds to a batch, on the host and ahead of its step, what the objective needs beside it."""
    before_step: Callable[[History, int], None] | None = None
    """Hook before each step, with the history and the number of finished steps."""
    checkpoint_dir: str = "checkpoints"
    """Directory of the checkpoints, below the job's work directory."""
    fp8: bool = False
    """Multiplies the adapted MLPs' frozen weights in 8 bits."""
    window: int = 1
    """Steps among which rows are redistributed on CUDA, so that all have one size (tasks.engine.data.sampler)."""

    def __post_init__(self) -> None:
        """Raises BadConfig for a batch that the processes cannot share evenly."""
        if self.config.batch_size % ranks.world_size():
            raise BadConfig(
                f"batch_size={self.config.batch_size} cannot be split over {ranks.world_size()} processes: "
                f"set a multiple of {ranks.world_size()}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        by_epochs = math.ceil(len(self.examples) * self.config.epochs / self.config.batch_size)
        return self.config.max_steps or max(1, by_epochs)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a shard of the layers' weights."""
        return self.strategy == "fsdp2" and ranks.world_size() > 1

    @property
    def rank_batch_size(self) -> int:
        """Rows of a step that this process works on."""
        return self.config.batch_size // ranks.world_size()

    @property
    def micro_batch(self) -> int:
        """Rows in memory at once."""
        return micro_batch(self.rank_batch_size, self.config.micro_batch_size)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of this process in a step."""
        return self.rank_batch_size // self.micro_batch

    @property
    def checkpoints(self) -> Path:
        """Directory of this run's checkpoints."""
        return self.job.work / self.checkpoint_dir

    def loss_sums(self, model: PreTrainedModel, batch: Batch) -> LossSums:
        """The objective of a batch with matrices multiplied in the config's precision; parameters keep theirs."""
        device = batch["input_ids"].device.type
        dtype = pick_dtype(self.config.precision, device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return self.objective.loss_sums(model, batch)

    def warn(self, text: str) -> None:
        """A warning in the job's log."""
        self.job.log(text, "warning")

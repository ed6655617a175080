"""Validation losses of a run."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.engine.data.collator import to_device
from tasks.engine.data.micro_batches import evaluation_batches, uses_packed_attention
from tasks.engine.distributed import ranks
from tasks.engine.training.spec import TrainingSpec

BATCHES_PER_EVENT = 16


def validation_losses(spec: TrainingSpec, model: PreTrainedModel) -> dict[str, float]:
    """Mean losses over the validation rows by name; empty without rows, and when a stop was requested meanwhile.

    Every process goes through all rows: with sharded weights each needs the others' shards.
    """
    sums: dict[str, Tensor] = {}
    normalizer = rows = reported = 0
    was_training = model.training
    model.train(False)
    packed = uses_packed_attention(model)
    for batch in evaluation_batches(spec.validation, len(spec.examples), spec.micro_batch, packed):
        if ranks.world_size() == 1 and spec.job.stop_requested:
            break
        with torch.no_grad():
            parts = spec.loss_sums(model, to_device(batch, model.device)).by_name()
        sums = {name: sums[name] + value if sums else value for name, value in parts.items()}
        normalizer, rows = normalizer + spec.objective.normalizer(batch), rows + len(batch["rows"])
        if rows - reported > BATCHES_PER_EVENT * spec.micro_batch or rows == len(spec.validation):
            spec.job.progress(rows, len(spec.validation), "validation rows")
            reported = rows
    model.train(was_training)
    if rows < len(spec.validation):
        return {}
    return {name: float(value) / normalizer for name, value in sums.items()}

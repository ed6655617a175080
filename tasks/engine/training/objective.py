"""What training minimises: sums of a loss over micro-batches, divided by what the loss is a mean over.

Objective(loss_sums)                                          # a mean over label tokens
Objective(loss_sums, lambda batch: len(batch["rows"]) // 2)   # a mean over pairs of rows (preference losses)
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from tasks.engine.data.collator import Batch
from tasks.engine.losses.loss_sums import LossSums


def label_count(batch: Batch) -> int:
    """Label tokens of a micro-batch."""
    return len(batch["labels"])


@dataclass(frozen=True)
class Objective:
    """A loss as sums over a micro-batch, and the number that it is divided by.

    `normalizer` depends on the batch alone: the loop adds it up over a step's micro-batches and processes before the
    first forward, so that each micro-batch's loss is divided before its backward.
    """

    loss_sums: Callable[[PreTrainedModel, Batch], LossSums]
    normalizer: Callable[[Batch], int] = label_count

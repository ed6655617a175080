"""What lies on the device beside the model that is trained: in distillation, the teacher or what is known of it.

config, plan = fitted(config, "full", student, rows, out, job, remembered(head, states=1152))
"""

from typing import NamedTuple

from torch import Tensor

from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.memory.model_sizes import count
from tasks.engine.memory.predict import NF4
from tasks.engine.models.load import read_config


class Beside(NamedTuple):
    """Bytes: always there, by token of a micro-batch, by label."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_label: float = 0.0


ALONE = Beside()
BYTES = {"8bit": 1.0, "4bit": NF4, "float32": 4.0}  # an element of a matrix, in the words of a teacher's precision


def remembered(head: Tensor | None, states: int) -> Beside:
    """A teacher's head (V, G), moved to the device in half precision, and `states` half-precision numbers a label."""
    return Beside(fixed=2.0 * head.numel() if head is not None else 0.0, per_label=2.0 * states)


def asked(teacher: ModelDir, precision: str) -> Beside:
    """A teacher in memory, asked without gradients: its weights, and a layer's work on each token."""
    shapes = count(read_config(teacher.base), TrainingConfig(rank=1), "lora")
    element = BYTES.get(precision, 2.0)
    half = 4.0 if precision == "float32" else 2.0
    fixed = shapes.packable * element + shapes.rest * half
    work = half * (3 * shapes.ffn + 4 * shapes.hidden + 2 * shapes.query)
    return Beside(fixed, work, half * shapes.hidden)

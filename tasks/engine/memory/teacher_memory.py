"""Device memory of a teacher beside the student: the model itself, or the cached outputs that stand for it.

config, plan = plan_memory(config, "full", student, rows, out, job, cached_teacher(head, width=1152))
"""

from typing import NamedTuple

from torch import Tensor

from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.memory.model_sizes import count_sizes
from tasks.engine.memory.predict import NF4
from tasks.engine.models.model_config import read_config


class ExtraMemory(NamedTuple):
    """Bytes beside the trained model: fixed, for each token of a micro-batch, for each label."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_label: float = 0.0


NO_EXTRA = ExtraMemory()
BYTES = {"8bit": 1.0, "4bit": NF4, "float32": 4.0}  # of a matrix's element, by a teacher's precision; else 16 bits


def cached_teacher(head: Tensor | None, width: int) -> ExtraMemory:
    """A cached teacher: its head (V, H), moved to the device in half precision, and `width` such numbers a label."""
    return ExtraMemory(fixed=2.0 * head.numel() if head is not None else 0.0, per_label=2.0 * width)


def live_teacher(teacher: ModelDir, precision: str) -> ExtraMemory:
    """A teacher that runs beside the student without gradients: its weights, and a layer's work on each token."""
    sizes = count_sizes(read_config(teacher.base), TrainingConfig(rank=1), "lora")
    element = BYTES.get(precision, 2.0)
    half = 4.0 if precision == "float32" else 2.0
    fixed = sizes.quantizable * element + sizes.unquantizable * half
    working = half * (3 * sizes.ffn + 4 * sizes.hidden + 2 * sizes.query)
    return ExtraMemory(fixed, working, half * sizes.hidden)

"""Fine-tunes the teacher on the team's rows: LoRA, QLoRA or all weights."""

from typing import Literal

from tasks.core.training import TrainingConfig


class FineTuneConfig(TrainingConfig):
    """Settings of `fine_tune`."""

    method: Literal["lora", "qlora", "full"] = "lora"
    """Adapters, adapters on a base in 4 bits (NF4), or all weights."""

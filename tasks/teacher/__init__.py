"""Fine-tunes the teacher on the team's rows: LoRA, QLoRA or all weights."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.core.config import MoreThan, OnlyWith
from tasks.core.training_config import TrainingConfig


class FineTuneConfig(TrainingConfig):
    """Settings of `fine_tune`."""

    method: Literal["lora", "qlora", "full"] = "lora"
    """Adapters, adapters on a base in 4 bits (NF4), or all weights."""
    fp8: bool = False
    """With `lora` on a card that has them (compute capability 8.9): multiply the MLPs' frozen weights in 8-bit floats,
    forward and backward. Faster, a little less exact; adapters, attention, norms and the head stay as they are."""
    processes: int = Field(1, ge=1, le=16)
    """GPUs of this host that train together, one process each; `batch_size` is split over them."""
    strategy: Annotated[Literal["ddp", "fsdp2"], OnlyWith("processes", MoreThan(1))] = "ddp"
    """With several processes: a whole model in each, or each layer's weights and optimizer state split over them."""

    @model_validator(mode="after")
    def _fp8_multiplies_frozen_weights(self) -> Self:
        wide = self.precision not in ("auto", "bfloat16")
        if self.fp8 and (self.method != "lora" or self.use_dora or self.dropout or wide):
            raise ValueError("fp8=true is for method=lora in bfloat16, without use_dora and dropout; set fp8=false")
        return self

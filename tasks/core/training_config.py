"""Settings of a training loop, shared by the stages that train: fine-tuning and distillation."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from tasks.core.config import RUN_WIDE, OnlyWith, StageConfig

ADAPTED = OnlyWith("method", ("lora", "qlora"))
# How a run is worked off, not what it makes: a checkpoint serves whatever these are.
EXECUTION_FIELDS = {
    "processes", "strategy", "micro_batch_size", "gradient_checkpointing", "compile", "cuda_graphs", "loss_chunk_mib",
    "memory_gib", "save_every_steps", "save_every_seconds",
}  # fmt: skip


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is neither `all-linear` nor a regular expression: {error}") from error
    return text


Regex = Annotated[str, AfterValidator(_regex)]


class TrainingConfig(StageConfig):
    """How a model is trained, whatever the loss."""

    rank: Annotated[int, ADAPTED] = Field(16, ge=1, le=1024)
    """Rank of the LoRA adapters."""
    alpha: Annotated[float, ADAPTED] = Field(32, gt=0)
    """LoRA's scale: an adapter's product is multiplied by alpha / rank (alpha / sqrt(rank) with rsLoRA)."""
    dropout: Annotated[float, ADAPTED] = Field(0, ge=0, lt=1)
    """Dropout before the adapters."""
    use_rslora: Annotated[bool, ADAPTED] = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    use_dora: Annotated[bool, ADAPTED] = False
    """Weight-decomposed adapters (arXiv 2402.09353): a little better at low rank, slower."""
    target_modules: Annotated[list[str] | Regex, ADAPTED] = "all-linear"
    """Modules that get adapters: `all-linear` (all but the head, and no vision or audio tower), a list of names
    (`[q_proj, v_proj]`), or a regular expression that a module's whole name must match."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of the steps in which the learning rate rises from 0."""
    epochs: Annotated[float, OnlyWith("max_steps", (None,))] = Field(2, gt=0)
    """Passes over the training rows; `max_steps` goes before it."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of `epochs`."""
    batch_size: int = Field(32, ge=1)
    """Rows in an optimizer step, whatever fits into memory at once."""
    micro_batch_size: int = Field(8, ge=1)
    """Most rows in memory at once; accumulated to `batch_size`. Fewer where the memory plan says so, and after
    running out of memory."""
    packing: Literal["auto", "off"] = "auto"
    """Rows one behind the other without padding, where the architecture allows it; off pads them."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the decoder's layers (CUDA): it takes a minute or two, so auto does it for runs that are long enough."""
    max_length: Annotated[int, RUN_WIDE] = Field(2048, ge=16)
    """Longest row in tokens; longer ones are left out with a warning."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """Replay each micro-batch's forward and backward as one CUDA graph, where the run allows it (packed rows, bfloat16,
    no dropout, `adamw`)."""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What matrices are multiplied in (auto: bfloat16 on a CUDA device that has it, float16 on one that has not,
    float32 on the CPU). Trained weights, and with float16 norms and residual stream too, stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower. The memory plan may set it."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW, or bitsandbytes' with 8-bit state (CUDA only)."""
    memory_gib: Literal["auto", "off"] | Annotated[float, Field(gt=0)] = "auto"
    """Device memory that the plan made before loading may fill: the card's (auto), so many GiB, or off for no plan."""
    allow_quality_loss: bool = False
    """After an out-of-memory error that nothing else mends, try with shorter rows, half the rank, LoRA instead of
    DoRA and fewer adapted modules, in this order."""
    weight_decay: float = Field(0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1, ge=0)
    """Gradients are clipped to this norm; 0 does not clip."""
    loss_chunk_mib: int = Field(256, ge=1)
    """Memory for logits: the loss takes the labelled rows in chunks of this size."""
    chat_template: Annotated[Literal["model", "gemma"], RUN_WIDE] = "model"
    """The model's own chat template, or Gemma's turns for a base model that has none."""
    seed: int = Field(0, ge=0)
    """Seed of the row order, of new adapters and of dropout."""
    validate_every_steps: int = Field(0, ge=0)
    """Validation loss every so many steps; 0 only at the end."""
    save_every_steps: int = Field(0, ge=0)
    """A checkpoint every so many steps; 0 by `save_every_seconds` alone."""
    save_every_seconds: float = Field(120, gt=0)
    """A checkpoint at least this often."""
    rollbacks: int = Field(2, ge=0, le=8)
    """How often a diverged run goes back to its last checkpoint with half the learning rate before it gives up."""

    @model_validator(mode="after")
    def _processes_share_a_batch(self) -> Self:
        processes = getattr(self, "processes", 1)
        if self.batch_size % processes:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be split over processes={processes}: make it a multiple"
            )
        return self

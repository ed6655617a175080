"""Settings of a training loop, shared by the stages that train: fine-tuning and distillation."""

from typing import Literal

from pydantic import Field

from tasks.core.config import StageConfig


class TrainingConfig(StageConfig):
    """How a model is trained, whatever the loss."""

    rank: int = Field(16, ge=1, le=1024)
    """Rank of the LoRA adapters."""
    alpha: float = Field(32, gt=0)
    """LoRA's scale: an adapter's product is multiplied by alpha / rank (alpha / sqrt(rank) with rsLoRA)."""
    dropout: float = Field(0, ge=0, lt=1)
    """Dropout before the adapters."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353): a little better at low rank, slower."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Modules that get adapters: `all-linear` (all but the head, and no vision or audio tower) or names."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of the steps in which the learning rate rises from 0."""
    epochs: float = Field(2, gt=0)
    """Passes over the training rows; `max_steps` goes before it."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of `epochs`."""
    batch_size: int = Field(32, ge=1)
    """Rows in an optimizer step, whatever fits into memory at once."""
    micro_batch_size: int = Field(8, ge=1)
    """Rows in memory at once; accumulated to `batch_size`. Halved after running out of memory."""
    max_length: int = Field(2048, ge=16)
    """Longest row in tokens; longer ones are left out with a warning."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """What matrices are multiplied in (auto: bfloat16 on a CUDA device that has it). Trained weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW, or bitsandbytes' with 8-bit state (CUDA only)."""
    weight_decay: float = Field(0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1, ge=0)
    """Gradients are clipped to this norm; 0 does not clip."""
    loss_chunk_mib: int = Field(256, ge=1)
    """Memory for logits: the loss takes the labelled rows in chunks of this size."""
    chat_template: Literal["model", "gemma"] = "model"
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

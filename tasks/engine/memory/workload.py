"""What of a config, and of its micro-batches, moves memory."""

from typing import NamedTuple

from tasks.core.training_config import TrainingConfig
from tasks.engine.models.trainable import Method


class Load(NamedTuple):
    """`tokens` are a micro-batch's, `labels` those of them with a label; `gated` stands
    for the adapted MLP as one operation (tasks.engine.speed.fused_lora.mlp), `away` for activations kept by the host
    (tasks.engine.speed.offload). `beside` are bytes of what lies beside the trained model, `per_label` bytes that
    each label
    brings along."""

    method: Method
    tokens: int
    labels: int
    precision: str
    recompute: bool
    optimizer: str
    dora: bool
    dropout: bool
    compiled: bool
    gated: bool
    chunk_bytes: int
    away: bool = False
    beside: float = 0.0
    per_label: float = 0.0

    @property
    def replayed(self) -> bool:
        """Whether the run is replayed as CUDA graphs, whose gradients always lie in one buffer."""
        return self.precision == "bfloat16" and self.optimizer == "adamw" and not self.dropout


def load_of(config: TrainingConfig, method: Method, tokens: int, labels: int | None = None) -> Load:
    """A config's part in it, with micro-batches of `tokens` tokens."""
    return Load(
        method,
        tokens,
        tokens if labels is None else labels,
        config.precision,
        config.gradient_checkpointing,
        config.optimizer,
        config.use_dora and method != "full",
        config.dropout > 0 and method != "full",
        config.compile == "on",
        method != "full" and not config.use_dora and config.dropout == 0,
        config.loss_chunk_mib << 20,
        config.compile == "on" and config.gradient_checkpointing and config.precision != "float32",
    )

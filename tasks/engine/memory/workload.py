"""What of a training config and its micro-batches decides memory."""

from typing import NamedTuple

from tasks.core.training_config import TrainingConfig
from tasks.engine.models.trainable import Method


class Workload(NamedTuple):
    """A micro-batch of `tokens` tokens, `labels` of them with a label, and how it is computed.

    `fused_mlp`: the adapted MLP is one operation (tasks.engine.speed.fused_lora.mlp). `offloaded`: activations wait in
    host memory (tasks.engine.speed.offload). `extra` are bytes of what is on the device beside the trained model,
    `per_label` further bytes for each label.
    """

    method: Method
    tokens: int
    labels: int
    precision: str
    recompute: bool
    optimizer: str
    dora: bool
    dropout: bool
    compiled: bool
    fused_mlp: bool
    chunk_bytes: int
    offloaded: bool = False
    extra: float = 0.0
    per_label: float = 0.0

    @property
    def cuda_graphs(self) -> bool:
        """Whether the run is replayed as CUDA graphs, whose gradients always lie in one buffer."""
        return self.precision == "bfloat16" and self.optimizer == "adamw" and not self.dropout


def workload_of(config: TrainingConfig, method: Method, tokens: int, labels: int | None = None) -> Workload:
    """The workload of a config with micro-batches of `tokens` tokens, all of them with a label by default."""
    return Workload(
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

"""Optimizer and learning-rate schedule of a run.

Weight decay applies to matrices and embeddings, not to norms and biases: transformers' two parameter groups, in its
order, so that a checkpoint's state finds its parameters by number.
"""

import math
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from tasks.core.training_config import TrainingConfig

# As in transformers' Trainer.get_decay_parameter_names.
NO_DECAY_PATTERNS = ["bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8}


def make_optimizer(
    model: nn.Module, config: TrainingConfig, learning_rate: float, replacement: tuple[Any, dict[str, Any]] | None
) -> torch.optim.Optimizer:
    """Fused AdamW or bitsandbytes' 8-bit AdamW over the trained parameters.

    `replacement`, a class and its settings, takes their place (sharded weights, CUDA graphs).
    """
    groups = parameter_groups(model, config.weight_decay)
    if replacement is not None:
        kind, settings = replacement
        optimizer: torch.optim.Optimizer = kind(groups, **settings)
        return optimizer
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True, **ADAMW)  # type: ignore[arg-type]
    return _eight_bit_adamw(model, groups, learning_rate, config.optimizer == "paged_adamw_8bit")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: with weight decay, and without."""
    decayed = set(cast(Any, get_parameter_names)(model, [nn.LayerNorm], NO_DECAY_PATTERNS))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int) -> LambdaLR:
    """Warm-up, then the config's schedule down to the last of `steps`."""
    name = "constant_with_warmup" if config.scheduler == "constant" else config.scheduler
    scheduler: LambdaLR = get_scheduler(
        name, optimizer, num_warmup_steps=math.ceil(config.warmup_ratio * steps), num_training_steps=steps
    )
    return scheduler


def _eight_bit_adamw(
    model: nn.Module, groups: list[dict[str, Any]], learning_rate: float, paged: bool
) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit state; an embedding's state stays in 32 bits, as bitsandbytes advises."""
    import bitsandbytes  # noqa: PLC0415  (seconds to import)

    library = cast(Any, bitsandbytes.optim)
    optimizer: torch.optim.Optimizer = library.AdamW(groups, lr=learning_rate, optim_bits=8, is_paged=paged, **ADAMW)
    overrides = library.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            overrides.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer

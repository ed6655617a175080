"""Memory fallback: the settings that training gives up, level by level, after out-of-memory errors.

    config_at_level(config, level)     # the settings after `level` out-of-memory errors
    fallback_levels(config)            # all of them, in order, with what each changes

Micro-batch, recompute and a paged 8-bit optimizer leave the effective batch and the model as they were, so training
resumes from its last checkpoint. Shorter rows, a smaller rank, LoRA instead of DoRA and fewer adapted modules make
another model: they come last, only with `allow_quality_loss`, and training begins anew.
"""

from collections.abc import Iterator
from typing import TypeVar

from tasks.core.errors import BadConfig
from tasks.core.training_config import TrainingConfig

C = TypeVar("C", bound=TrainingConfig)
MINIMAL_MODULES = ["q_proj", "v_proj"]


def config_at_level(config: C, level: int) -> C:
    """The settings at a memory fallback level, 0 as configured. BadConfig, with all levels, below the last one."""
    if level == 0:
        return config
    levels = list(fallback_levels(config))
    if level > len(levels):
        changes = "; ".join(text for text, _ in levels) or "nothing is left to give up"
        lossy = "" if config.allow_quality_loss else ", or allow_quality_loss=true to let it shrink rank and context"
        raise BadConfig(
            f"out of memory on the last of {len(levels)} memory fallback levels ({changes}). Set a smaller max_length "
            f"(now {config.max_length}), method=qlora or a smaller base{lossy}"
        )
    return levels[level - 1][1]


def fallback_levels(config: C) -> Iterator[tuple[str, C]]:
    """What each level changes, in words, and the settings with its change and all before it."""
    yield from _lossless_levels(config)
    if config.allow_quality_loss:
        lossless = [settings for _, settings in _lossless_levels(config)]
        yield from _lossy_levels(lossless[-1] if lossless else config)


def is_lossless(config: TrainingConfig, level: int) -> bool:
    """Whether training can resume from a checkpoint of the levels above."""
    return level <= len(list(_lossless_levels(config)))


def micro_batch(batch_size: int, limit: int) -> int:
    """Rows in memory at once: the largest divisor of `batch_size` not above `limit`."""
    return next(size for size in range(max(1, min(limit, batch_size)), 0, -1) if batch_size % size == 0)


def _lossless_levels(config: C) -> Iterator[tuple[str, C]]:
    size = micro_batch(config.batch_size, config.micro_batch_size)
    while size > 1:
        smaller = micro_batch(config.batch_size, size // 2)
        text = f"micro-batch {size} -> {smaller}, accumulated to {config.batch_size} as before"
        size, config = smaller, config.model_copy(update={"micro_batch_size": smaller})
        yield text, config
    if not config.gradient_checkpointing:
        config = config.model_copy(update={"gradient_checkpointing": True})
        yield "recompute on", config
    if config.optimizer != "paged_adamw_8bit":
        text = f"optimizer {config.optimizer} -> paged_adamw_8bit"
        config = config.model_copy(update={"optimizer": "paged_adamw_8bit"})
        yield text, config


def _lossy_levels(config: C) -> Iterator[tuple[str, C]]:
    if config.max_length >= 32:
        shorter = config.max_length // 2
        text = f"max_length {config.max_length} -> {shorter}, longer rows left out"
        config = config.model_copy(update={"max_length": shorter})
        yield text, config
    if getattr(config, "method", "full") == "full":
        return
    if config.rank > 1:
        half = config.rank // 2
        text = f"rank {config.rank} -> {half}"  # alpha / rank stays: the adapter's products keep their size
        config = config.model_copy(update={"rank": half, "alpha": config.alpha * half / config.rank})
        yield text, config
    if config.use_dora:
        config = config.model_copy(update={"use_dora": False})
        yield "DoRA off", config
    if config.target_modules != MINIMAL_MODULES:
        config = config.model_copy(update={"target_modules": MINIMAL_MODULES})
        yield f"adapters on {' and '.join(MINIMAL_MODULES)} only", config

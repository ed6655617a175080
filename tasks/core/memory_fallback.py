"""What training gives up, rung by rung, when the device's memory ran out.

    settings_at(config, rung)     # the settings after `rung` out-of-memory errors
    rungs(config)                 # all of them, in order, with what each changes

Micro-batch, recompute and a paged 8-bit optimizer leave the effective batch and the model as they were, so training
goes on from its last checkpoint. Shorter rows, a smaller rank, LoRA instead of DoRA and fewer adapted modules make
another model: they come last, only with `allow_quality_loss`, and training begins anew.
"""

from collections.abc import Iterator
from typing import TypeVar

from tasks.core.errors import BadConfig
from tasks.core.training_config import TrainingConfig

C = TypeVar("C", bound=TrainingConfig)
FEWEST_MODULES = ["q_proj", "v_proj"]


def settings_at(config: C, rung: int) -> C:
    """`config` as it is `rung` rungs down; BadConfig, with all that was tried, below the last one."""
    if rung == 0:
        return config
    steps = list(rungs(config))
    if rung > len(steps):
        tried = "; ".join(text for text, _ in steps) or "nothing is left to give up"
        more = "" if config.allow_quality_loss else ", or allow_quality_loss=true to let it shrink rank and context"
        raise BadConfig(
            f"out of memory on the last of {len(steps)} rungs ({tried}). Set a smaller max_length (now "
            f"{config.max_length}), method=qlora or a smaller base{more}"
        )
    return steps[rung - 1][1]


def rungs(config: C) -> Iterator[tuple[str, C]]:
    """What each rung changes, in words, and the settings with this and all changes before it."""
    yield from _lossless(config)
    if config.allow_quality_loss:
        lossless = [settings for _, settings in _lossless(config)]
        yield from _lossy(lossless[-1] if lossless else config)


def is_lossless(config: TrainingConfig, rung: int) -> bool:
    """Whether a checkpoint of the rungs above can still be continued."""
    return rung <= len(list(_lossless(config)))


def micro_batch(batch_size: int, most: int) -> int:
    """Rows in memory at once: the largest divisor of `batch_size` that is not above `most`."""
    return next(size for size in range(max(1, min(most, batch_size)), 0, -1) if batch_size % size == 0)


def _lossless(config: C) -> Iterator[tuple[str, C]]:
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


def _lossy(config: C) -> Iterator[tuple[str, C]]:
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
    if config.target_modules != FEWEST_MODULES:
        config = config.model_copy(update={"target_modules": FEWEST_MODULES})
        yield f"adapters on {' and '.join(FEWEST_MODULES)} only", config

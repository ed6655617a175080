"""The settings that fit a card: micro-batch, recompute and optimizer, the effective batch as it was.

config, plan = fitted(config, "lora", base, rows, out, job)     # for the card that is there, told and written
config, plan = fit(config, "lora", base, lengths, labels, 22.5) # BadConfig, with the numbers, when nothing fits
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.memory_fallback import micro_batch
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import row_order
from tasks.engine.data.sequence_packing import plan_packing
from tasks.engine.distributed import ranks
from tasks.engine.memory.model_sizes import Shapes, shapes_of
from tasks.engine.memory.plan_report import Choice, MemoryPlan
from tasks.engine.memory.predict import GIB, Parts, predict
from tasks.engine.memory.teacher_memory import ALONE, Beside
from tasks.engine.memory.workload import Load, load_of
from tasks.engine.models.load import pick_device, pick_dtype
from tasks.engine.models.trainable import Method

C = TypeVar("C", bound=TrainingConfig)
BUSY = 4096  # tokens of a micro-batch from which a card is about fully used
STEPS_LOOKED_AT = 200


def card_gib() -> float | None:
    """GiB of the CUDA device that others do not use, or None without one; whole GiB below 1, so that it stays put."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    ours = torch.cuda.memory_reserved()
    used = (total - free - ours) / GIB
    return total / GIB - (0.0 if used < 1.0 else math.ceil(used))


def fitted(
    config: C, method: Method, base: ModelDir, rows: Sequence[Example], out: Path, job: Job, beside: Beside = ALONE
) -> tuple[C, MemoryPlan | None]:
    """The settings that fit the device's memory, told and written; the config's own without a plan."""
    gib = card_gib() if config.memory_gib == "auto" else None if config.memory_gib == "off" else config.memory_gib
    gib = ranks.agree(gib)  # the cards may differ by a few MiB, the settings may not
    if gib is None:
        return config, None
    lengths = [len(row.input_ids) for row in rows]
    labels = sum(len(row.answer_ids) for row in rows) / sum(lengths)
    config, plan = fit(config, method, base, lengths, labels, gib, ranks.count(), beside)
    job.log(f"memory plan: {plan.chosen.say()}, of {gib:.1f}")
    plan.write(out)
    return config, plan


def fit(
    config: C, method: Method, base: ModelDir, lengths: Sequence[int], labels: float, gib: float, count: int = 1,
    beside: Beside = ALONE,
) -> tuple[C, MemoryPlan]:  # fmt: skip
    """The config that fits, and all that was looked at.

    `lengths` are the rows' tokens, `labels` the share of them with a label, `count` the processes that share a step.
    Raises BadConfig when nothing fits.
    """
    shapes = shapes_of(base, config, method)
    choices = list(_choices(config, method, shapes, lengths, labels, count, beside))
    fitting = [choice for choice in choices if choice.fits(gib)]
    if not fitting:
        least = min(choices, key=lambda choice: choice.parts.card)
        parts = ", ".join(f"{name} {value:.1f}" for name, value in least.parts._asdict().items() if value >= 0.05)
        raise BadConfig(
            f"{gib:.1f} GiB of device memory are not enough. The least: {least.say()} ({parts}). Set a smaller "
            f"max_length (the longest row has {max(lengths)} tokens){_advice(method, config)}; memory_gib=off tries it "
            "anyway"
        )
    chosen = min(fitting, key=lambda choice: choice.cost)
    update = {
        "micro_batch_size": chosen.micro_batch,
        "gradient_checkpointing": chosen.recompute,
        "optimizer": chosen.optimizer,
    }
    return config.model_copy(update=update), MemoryPlan(gib, chosen, choices)


def _advice(method: Method, config: TrainingConfig) -> str:
    field = type(config).model_fields.get("method")
    packs = field is None or "qlora" in str(field.annotation)
    packed = ", method=qlora or a smaller base" if packs else " or a smaller model"
    return {"full": ", method=lora", "lora": packed, "qlora": " or a smaller base"}[method]


def _choices(
    config: TrainingConfig, method: Method, shapes: Shapes, lengths: Sequence[int], labels: float, count: int,
    beside: Beside,
) -> Iterator[Choice]:  # fmt: skip
    own = config.batch_size // count
    size = micro_batch(own, config.micro_batch_size)
    optimizers = dict.fromkeys([config.optimizer, "paged_adamw_8bit"])
    precision = str(pick_dtype(config.precision, pick_device())).removeprefix("torch.")
    while True:
        tokens = tokens_of(lengths, config.batch_size, size * count, config.seed)
        for optimizer in optimizers:
            for recompute in [True] if config.gradient_checkpointing else [False, True]:
                update = {"gradient_checkpointing": recompute, "optimizer": optimizer, "precision": precision}
                tried = config.model_copy(update=update)
                load = load_of(tried, method, tokens, math.ceil(tokens * labels))
                load = load._replace(beside=beside.fixed + beside.per_token * tokens, per_label=beside.per_label)
                parts = _worst(shapes, load, config.compile)
                yield Choice(size, tokens, recompute, optimizer, parts, _cost(config, tokens, recompute, optimizer))
        if size == 1:
            return
        size = micro_batch(own, size // 2)


def _worst(shapes: Shapes, load: Load, compile: str) -> Parts:
    """The larger of both ways where the run itself decides whether to compile."""
    ways = {"on": [True], "off": [False], "auto": [True, False]}[compile]
    return max((predict(shapes, load._replace(compiled=compiled)) for compiled in ways), key=lambda parts: parts.peak)


def tokens_of(lengths: Sequence[int], batch_size: int, size: int, seed: int) -> int:
    """Tokens of the largest of micro-batches of `size` rows, from the order in which the rows will come."""
    steps = min(STEPS_LOOKED_AT, max(1, len(lengths) // batch_size))
    order = row_order(lengths, batch_size, steps, seed)
    dealt = plan_packing(lengths, order, batch_size, size, 0, 1).micro_batches
    return max(sum(lengths[row] for row in rows) for rows in dealt)


def _cost(config: TrainingConfig, tokens: int, recompute: bool, optimizer: str) -> float:
    """About how much longer a step takes: a third for recompute, more for a micro-batch that leaves the card idle."""
    slower = (4 / 3 if recompute else 1.0) * (1 + max(0.0, BUSY / tokens - 1) / 4)
    return slower * (1.05 if optimizer != config.optimizer else 1.0)

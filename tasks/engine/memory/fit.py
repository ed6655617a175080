"""Chooses the micro-batch, recompute and optimizer that fit a card's memory; the effective batch stays the same.

config, plan = plan_memory(config, "lora", base, rows, out, job)          # for this machine's card; logged, reported
config, plan = fit_settings(config, "lora", base, lengths, labels, 22.5)  # for 22.5 GiB; BadConfig when nothing fits
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
from tasks.engine.data.sampler import row_order
from tasks.engine.data.sequence_packing import pack_steps
from tasks.engine.distributed import ranks
from tasks.engine.memory.model_sizes import ModelSizes, sizes_of
from tasks.engine.memory.plan_report import Candidate, MemoryPlan
from tasks.engine.memory.predict import GIB, MemoryParts, predict
from tasks.engine.memory.teacher_memory import NO_EXTRA, ExtraMemory
from tasks.engine.memory.workload import Workload, workload_of
from tasks.engine.models.dtypes import pick_device, pick_dtype
from tasks.engine.models.trainable import Method

C = TypeVar("C", bound=TrainingConfig)
SATURATING_TOKENS = 4096  # of a micro-batch, from which on a card is about fully used
SAMPLED_STEPS = 200  # of the run, whose largest micro-batch is planned for


def card_gib() -> float | None:
    """GiB of the CUDA device that no other process uses, None without a device.

    Others' use is rounded up to whole GiB, and ignored below 1, so that the plan does not change from run to run.
    """
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    used = (total - free - torch.cuda.memory_reserved()) / GIB
    return total / GIB - (0.0 if used < 1.0 else math.ceil(used))


def plan_memory(
    config: C,
    method: Method,
    base: ModelDir,
    rows: Sequence[Example],
    out: Path,
    job: Job,
    extra: ExtraMemory = NO_EXTRA,
) -> tuple[C, MemoryPlan | None]:
    """The config with settings that fit the device's memory, and the plan, logged and written to the report; the config
    itself without a plan, where there is no device or memory_gib=off."""
    gib = card_gib() if config.memory_gib == "auto" else None if config.memory_gib == "off" else config.memory_gib
    gib = ranks.broadcast(gib)  # the cards may differ by a few MiB, the settings may not
    if gib is None:
        return config, None
    lengths = [len(row.input_ids) for row in rows]
    labels = sum(len(row.answer_ids) for row in rows) / sum(lengths)
    config, plan = fit_settings(config, method, base, lengths, labels, gib, ranks.world_size(), extra)
    job.log(f"memory plan: {plan.chosen.describe()}, of {gib:.1f}")
    plan.write(out)
    return config, plan


def fit_settings(
    config: C, method: Method, base: ModelDir, lengths: Sequence[int], labels: float, gib: float, count: int = 1,
    extra: ExtraMemory = NO_EXTRA,
) -> tuple[C, MemoryPlan]:  # fmt: skip
    """The config with the fastest settings that fit, and the plan.

    `lengths` are the rows' tokens, `labels` the share of them with a label, `count` the processes that share a step.
    Raises BadConfig when nothing fits.
    """
    sizes = sizes_of(base, config, method)
    candidates = list(_candidates(config, method, sizes, lengths, labels, count, extra))
    fitting = [candidate for candidate in candidates if candidate.fits(gib)]
    if not fitting:
        least = min(candidates, key=lambda candidate: candidate.parts.card)
        parts = ", ".join(f"{name} {value:.1f}" for name, value in least.parts._asdict().items() if value >= 0.05)
        raise BadConfig(
            f"{gib:.1f} GiB of device memory are not enough. The least: {least.describe()} ({parts}). Set a smaller "
            f"max_length (the longest row has {max(lengths)} tokens){_remedy(method, config)}; memory_gib=off tries it "
            "anyway"
        )
    chosen = min(fitting, key=lambda candidate: candidate.cost)
    update = {
        "micro_batch_size": chosen.micro_batch,
        "gradient_checkpointing": chosen.recompute,
        "optimizer": chosen.optimizer,
    }
    return config.model_copy(update=update), MemoryPlan(gib, chosen, candidates)


def _remedy(method: Method, config: TrainingConfig) -> str:
    field = type(config).model_fields.get("method")
    has_qlora = field is None or "qlora" in str(field.annotation)
    instead_of_lora = ", method=qlora or a smaller base" if has_qlora else " or a smaller model"
    return {"full": ", method=lora", "lora": instead_of_lora, "qlora": " or a smaller base"}[method]


def _candidates(
    config: TrainingConfig, method: Method, sizes: ModelSizes, lengths: Sequence[int], labels: float, count: int,
    extra: ExtraMemory,
) -> Iterator[Candidate]:  # fmt: skip
    """Halved micro-batches, each with both optimizers, with and without recompute."""
    rows_a_process = config.batch_size // count
    size = micro_batch(rows_a_process, config.micro_batch_size)
    optimizers = dict.fromkeys([config.optimizer, "paged_adamw_8bit"])
    precision = str(pick_dtype(config.precision, pick_device())).removeprefix("torch.")
    while True:
        tokens = largest_micro_batch(lengths, config.batch_size, size * count, config.seed)
        for optimizer in optimizers:
            for recompute in [True] if config.gradient_checkpointing else [False, True]:
                update = {"gradient_checkpointing": recompute, "optimizer": optimizer, "precision": precision}
                work = workload_of(config.model_copy(update=update), method, tokens, math.ceil(tokens * labels))
                work = work._replace(extra=extra.fixed + extra.per_token * tokens, per_label=extra.per_label)
                parts = _worst(sizes, work, config.compile)
                yield Candidate(size, tokens, recompute, optimizer, parts, _cost(config, tokens, recompute, optimizer))
        if size == 1:
            return
        size = micro_batch(rows_a_process, size // 2)


def _worst(sizes: ModelSizes, work: Workload, compile: str) -> MemoryParts:
    """The larger prediction, compiled or not, where the run itself decides whether to compile."""
    options = {"on": [True], "off": [False], "auto": [True, False]}[compile]
    return max((predict(sizes, work._replace(compiled=compiled)) for compiled in options), key=lambda parts: parts.peak)


def largest_micro_batch(lengths: Sequence[int], batch_size: int, size: int, seed: int) -> int:
    """Tokens of the largest of the run's micro-batches of `size` rows, from the order that training will use."""
    steps = min(SAMPLED_STEPS, max(1, len(lengths) // batch_size))
    order = row_order(lengths, batch_size, steps, seed)
    micro_batches = pack_steps(lengths, order, batch_size, size, 0, 1).micro_batches
    return max(sum(lengths[row] for row in rows) for rows in micro_batches)


def _cost(config: TrainingConfig, tokens: int, recompute: bool, optimizer: str) -> float:
    """About how much longer a step takes: a third for recompute, more for a micro-batch that leaves the card idle."""
    factor = (4 / 3 if recompute else 1.0) * (1 + max(0.0, SATURATING_TOKENS / tokens - 1) / 4)
    return factor * (1.05 if optimizer != config.optimizer else 1.0)

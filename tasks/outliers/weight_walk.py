"""The weights of one model, walked tensor by tensor: numbers of each, what changed against its base, norms as gains."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.models.norms import adds_one, is_norm
from tasks.engine.weights.effective import Weight, weights
from tasks.outliers import OutlierConfig
from tasks.outliers.inheritance import base_weights, change
from tasks.outliers.stats import describe, gain, rounding

Numbers = dict[str, Any]
WORKERS = 8  # at most: each holds some pieces of a tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: tensors share the cores instead, and pieces are as small as a core's cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def walk(
    config: OutlierConfig, name: str, model: ModelDir, base: ModelDir | None, seen: dict[object, Numbers], job: Job
) -> list[Numbers]:
    """One model's numbers, tensor by tensor; what another model has from the same bytes is not computed again."""
    theirs = base_weights(base) if base is not None else {}
    mine = list(weights(model))

    def look(weight: Weight) -> Numbers:
        known = None if weight.changed else seen.get(weight.stored)
        numbers = known or describe(weight, config.sigmas, config.sample_values)
        numbers = {**numbers, **_norm(model, weight)}
        if weight.name in theirs:
            numbers |= change(weight, theirs[weight.name])
            before = _norm(model, theirs[weight.name])
            numbers |= {"base_gain": before["gain"]} if before else {}
        return numbers

    largest_first = sorted(range(len(mine)), key=lambda i: -prod(mine[i].shape))
    tensors: dict[int, Numbers] = {}
    with ThreadPoolExecutor(min(WORKERS, len(os.sched_getaffinity(0)))) as pool:
        for i, numbers in zip(largest_first, pool.map(look, [mine[i] for i in largest_first]), strict=True):
            tensors[i] = numbers
            job.progress(len(tensors), len(mine), "tensors", name)
    for i, weight in enumerate(mine):
        if not weight.changed:
            seen[weight.stored] = {k: v for k, v in tensors[i].items() if k not in CHANGES}
    return [tensors[i] for i in range(len(mine))]


CHANGES = ("changed", "max_change", "relative_change", "base_gain", "gain", "rounding", "adds_one")


def _norm(model: ModelDir, weight: Weight) -> Numbers:
    if not is_norm(weight.name, weight.shape):
        return {}
    one = adds_one(model.base, weight.name)
    values = weight.rows()
    return {"gain": gain(values, one), "rounding": rounding(values, one), "adds_one": one}

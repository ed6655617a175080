"""Walks a model's weights tensor by tensor: statistics of each, its change from the base, and norms as gains."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.models.tensor_names import gain_offset, is_norm
from tasks.engine.weights.effective import Weight, effective_weights
from tasks.outliers import OutlierConfig
from tasks.outliers.inheritance import base_weights, change
from tasks.outliers.tensor_statistics import describe, gain, rounding

Numbers = dict[str, Any]
MAX_WORKERS = 8  # each holds some chunks of a tensor
MODEL_SPECIFIC = ("changed", "max_change", "relative_change", "base_gain", "gain", "rounding", "adds_one")
"""What two models that store the same bytes may differ in."""


@contextmanager
def single_thread() -> Iterator[None]:
    """Runs torch's operations on one thread each: the walk's threads share the cores, a chunk fits a core's cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def walk(
    config: OutlierConfig, name: str, model: ModelDir, base: ModelDir | None, cache: dict[object, Numbers], job: Job
) -> list[Numbers]:
    """Statistics of one model's tensors in name order; `cache` shares those of models that store the same bytes."""
    base_tensors = base_weights(base) if base is not None else {}
    model_tensors = list(effective_weights(model))

    def tensor_numbers(weight: Weight) -> Numbers:
        cached = None if weight.changed else cache.get(weight.stored)
        numbers = cached or describe(weight, config.sigmas, config.sample_values)
        numbers = {**numbers, **_norm(model, weight)}
        if weight.name in base_tensors:
            numbers |= change(weight, base_tensors[weight.name])
            base_norm = _norm(model, base_tensors[weight.name])
            numbers |= {"base_gain": base_norm["gain"]} if base_norm else {}
        return numbers

    largest_first = sorted(range(len(model_tensors)), key=lambda i: -prod(model_tensors[i].shape))
    tensors: dict[int, Numbers] = {}
    with ThreadPoolExecutor(min(MAX_WORKERS, len(os.sched_getaffinity(0)))) as pool:
        for i, numbers in zip(
            largest_first, pool.map(tensor_numbers, [model_tensors[i] for i in largest_first]), strict=True
        ):
            tensors[i] = numbers
            job.progress(len(tensors), len(model_tensors), "tensors", name)
    for i, weight in enumerate(model_tensors):
        if not weight.changed:
            cache[weight.stored] = {key: value for key, value in tensors[i].items() if key not in MODEL_SPECIFIC}
    return [tensors[i] for i in range(len(model_tensors))]


def _norm(model: ModelDir, weight: Weight) -> Numbers:
    if not is_norm(weight.name, weight.shape):
        return {}
    offset = gain_offset(model.base, weight.name)
    values = weight.rows()
    return {"gain": gain(values, offset), "rounding": rounding(values, offset), "adds_one": bool(offset)}

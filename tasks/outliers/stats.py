"""Statistics of one tensor in one pass over its rows.

A histogram over the 65536 patterns of a 16-bit float holds everything but the channels: mean, moments, percentiles
and counts follow from it exactly for bfloat16 and float16; float32 values are counted at bfloat16's resolution (1/256).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tasks.engine.weights import Weight
from tasks.outliers.blocks import BLOCK, block_errors, block_rows

FLOAT16_MAX = 65504.0
PIECE = 1 << 18  # values at a time: what fits into a core's cache


def describe(weight: Weight, sigmas: float) -> dict[str, Any]:
    """Numbers of a weight in effect; NaN and infinite values are counted and left out of the rest."""
    carrier = torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
    histogram = torch.zeros(1 << 16, dtype=torch.int64)
    row_max = torch.empty(weight.shape[0] if weight.shape else 1)
    done = 0
    column_max = torch.zeros(math.prod(weight.shape[1:]))
    errors = {"q8_0": 0.0, "q4_0": 0.0}
    for chunk in _pieces(weight):
        patterns = chunk.to(carrier).view(torch.int16).reshape(-1).to(torch.int32) & 0xFFFF
        histogram += torch.bincount(patterns, minlength=1 << 16)
        values = chunk.float().nan_to_num_(0.0, 0.0, 0.0)
        magnitudes = values.reshape(len(values), -1).abs()
        row_max[done : done + len(values)] = magnitudes.amax(1)
        done += len(values)
        torch.maximum(column_max, magnitudes.amax(0), out=column_max)
        blocks = block_rows(values)
        if blocks is not None:
            for kind, error in block_errors(blocks).items():
                errors[kind] += error
    largest = float(column_max.max())
    moments = _moments(histogram, carrier, sigmas)
    numbers: dict[str, Any] = {
        "tensor": weight.name,
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        **moments,
        "max": largest,
        "float16_headroom": FLOAT16_MAX / largest if largest else None,
    }
    if len(weight.shape) > 1:
        numbers["worst_row"] = _worst(row_max)
        numbers["worst_column"] = _worst(column_max)
        if weight.shape[-1] % BLOCK == 0:
            energy = moments["numbers"] * (moments["std"] ** 2 + moments["mean"] ** 2)
            numbers["error"] = {kind: (total / energy) ** 0.5 if energy else 0.0 for kind, total in errors.items()}
    return numbers


def gain(values: Tensor, adds_one: bool) -> dict[str, float]:
    """A norm's gains, the values that multiply: largest, 99.9th percentile and mean of the magnitude, and smallest."""
    multiplier = (values.double() + 1 if adds_one else values.double()).abs()
    return {
        "max": float(multiplier.max()),
        "p999": float(multiplier.quantile(0.999)),
        "mean": float(multiplier.mean()),
        "min": float(multiplier.min()),
        "channel": int(multiplier.argmax()),
    }


def _pieces(weight: Weight) -> Iterator[Tensor]:
    """The weight's rows in pieces of about PIECE values; a number alone counts as a row."""
    for chunk in weight.chunks():
        rows = chunk if chunk.ndim else chunk.reshape(1)
        step = max(1, PIECE // max(1, math.prod(rows.shape[1:])))
        yield from (rows[start : start + step] for start in range(0, len(rows), step))


def _moments(histogram: Tensor, carrier: torch.dtype, sigmas: float) -> dict[str, Any]:
    """Moments in float64 and percentiles of the magnitude, from counts of bit patterns."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(carrier).double()
    finite = values.isfinite()
    not_finite = {"nan": int(histogram[values.isnan()].sum()), "inf": int(histogram[values.isinf()].sum())}
    values, counts = values[finite], histogram[finite].double()
    n = float(counts.sum())
    if not n:
        nothing = dict.fromkeys(("mean", "mean_abs", "std", "p99", "p999", "beyond_sigmas"), 0.0)
        return {"numbers": int(histogram.sum()), **not_finite, **nothing, "kurtosis": None}
    mean = float((values * counts).sum() / n)
    centred = values - mean
    variance = float((centred.square() * counts).sum() / n)
    fourth = float((centred.pow(4) * counts).sum() / n)
    magnitudes, order = values.abs().sort()
    cumulative = counts[order].cumsum(0)
    return {
        "numbers": int(histogram.sum()),
        **not_finite,
        "mean": mean,
        "mean_abs": float((values.abs() * counts).sum() / n),
        "std": variance**0.5,
        "kurtosis": fourth / variance**2 if variance else None,  # 3 for a normal distribution
        "p99": float(magnitudes[torch.searchsorted(cumulative, 0.99 * n)]),
        "p999": float(magnitudes[torch.searchsorted(cumulative, 0.999 * n)]),
        "beyond_sigmas": int(counts[centred.abs() > sigmas * variance**0.5].sum()) if variance else 0,
    }


def _worst(maxima: Tensor) -> dict[str, float]:
    """The channel with the largest magnitude, and how far it stands above the median channel's."""
    median = float(maxima.median())
    return {
        "index": int(maxima.argmax()),
        "max": float(maxima.max()),
        "over_median": float(maxima.max()) / median if median else 0.0,
    }

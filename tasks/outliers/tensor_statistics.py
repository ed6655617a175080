"""Statistics of one tensor in one pass over its rows.

A histogram over the 65536 patterns of a 16-bit float holds everything but the channels: mean, moments, percentiles
and counts follow from it exactly for bfloat16 and float16; float32 values are counted at bfloat16's resolution (1/256).
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tasks.engine.weights.effective import Weight
from tasks.outliers.formats import actual_type, errors

FLOAT16_MAX = 65504.0


def describe(weight: Weight, sigmas: float, sample_values: int) -> dict[str, Any]:
    """Statistics of a weight with its adapter merged; NaN and infinite values are counted and otherwise left out."""
    carrier = torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
    histogram = torch.zeros(1 << 16, dtype=torch.int64)
    row_max = torch.empty(weight.shape[0] if weight.shape else 1)
    column_max = torch.zeros(math.prod(weight.shape[1:]))
    wide = torch.empty(0, dtype=torch.int32)
    start = 0
    for rows in weight.chunks():  # 2 million values: counting less at a time spends more on the histogram itself
        chunk = rows if rows.ndim else rows.reshape(1)
        patterns = chunk.to(carrier).view(torch.int16)
        wide = wide if len(wide) >= chunk.numel() else torch.empty(chunk.numel(), dtype=torch.int32)
        bins = wide[: chunk.numel()].copy_(patterns.reshape(-1)).add_(1 << 15)
        histogram += torch.bincount(bins, minlength=1 << 16)
        row_max[start : start + len(chunk)], columns = _maxima(chunk, patterns)
        start += len(chunk)
        torch.maximum(column_max, columns, out=column_max)
    largest = float(column_max.max())
    numbers: dict[str, Any] = {
        "tensor": weight.name,
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        **_moments(histogram, carrier, sigmas),
        "max": largest,
        "float16_headroom": FLOAT16_MAX / largest if largest else None,
    }
    if len(weight.shape) > 1:
        numbers["worst_row"] = _worst_channel(row_max)
        numbers["worst_column"] = _worst_channel(column_max)
    if len(weight.shape) == 2 and sample_values:
        numbers["error"] = errors(sample(weight, sample_values))
        numbers["becomes"] = {name: actual_type(name.upper(), weight.shape[1]) for name in ("q4_k", "q6_k")}
    return numbers


def sample(weight: Weight, values: int) -> Tensor:
    """About `values` of a matrix in float32: whole rows, evenly spread, NaN and infinity as 0."""
    rows = max(1, min(weight.shape[0], values // weight.shape[1]))
    if rows == weight.shape[0]:
        return weight.rows().float().nan_to_num_(0.0, 0.0, 0.0)
    runs = min(rows, 8)  # short runs of neighbours: rows one by one would be a read each
    length = rows // runs
    starts = [i * (weight.shape[0] - length) // max(1, runs - 1) for i in range(runs)]
    return torch.cat([weight.rows(start, start + length) for start in starts]).float().nan_to_num_(0.0, 0.0, 0.0)


def gain(values: Tensor, offset: float) -> dict[str, Any]:
    """Statistics of the magnitudes of a norm's gains, the values that multiply: its weight plus `offset` (0 or 1)."""
    multiplier = (values.double() + offset).abs()
    return {
        "max": float(multiplier.max()),
        "p999": float(multiplier.quantile(0.999)),
        "mean": float(multiplier.mean()),
        "min": float(multiplier.min()),
        "channel": int(multiplier.argmax()),
        "histogram": [int(n) for n in torch.histc(multiplier.clamp(min=1e-9).log2().clamp(-8, 15.99), 48, -8, 16)],
    }


def rounding(values: Tensor, offset: float) -> dict[str, float]:
    """Relative root-mean-square error of a norm's gains once its weight is stored in 16 bits.

    A gain near 0 that is stored as gain - 1 lies near -1, where bfloat16 has steps of 1/256 and float16 of 1/2048.
    """
    gains = values.double() + offset
    energy = float(gains.square().mean())
    return {
        str(dtype).removeprefix("torch."): (
            float((values.to(dtype).double() + offset - gains).nan_to_num(0.0, 1e4, 1e4).square().mean()) / energy
        ) ** 0.5 if energy else 0.0
        for dtype in (torch.bfloat16, torch.float16)
    }  # fmt: skip


def _maxima(chunk: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitudes by row and by column; without its sign a 16-bit float's pattern orders as its value does."""
    if chunk.dtype in (torch.bfloat16, torch.float16):
        unsigned = (patterns & 0x7FFF).reshape(len(chunk), -1)
        rows, columns = (unsigned.amax(axis).view(chunk.dtype).float() for axis in (1, 0))
        if bool(rows.isfinite().all()):
            return rows, columns
    magnitudes = chunk.float().nan_to_num_(0.0, 0.0, 0.0).abs_().reshape(len(chunk), -1)
    return magnitudes.amax(1), magnitudes.amax(0)


@cache
def _values(carrier: torch.dtype) -> Tensor:
    """The value of every pattern, from -32768 on, in float64."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(carrier).double()


def _moments(histogram: Tensor, carrier: torch.dtype, sigmas: float) -> dict[str, Any]:
    """Moments in float64 and percentiles of the magnitude, from counts of bit patterns."""
    present = histogram.nonzero().squeeze(1)
    values, counts = _values(carrier)[present], histogram[present].double()
    nans, infs = (int(counts[is_such(values)].sum()) for is_such in (torch.isnan, torch.isinf))
    counted: dict[str, Any] = {"numbers": int(histogram.sum()), "nan": nans, "inf": infs}
    if nans or infs:
        values, counts = values[values.isfinite()], counts[values.isfinite()]
    n = float(counts.sum())
    if not n:
        zeros = dict.fromkeys(("mean", "mean_abs", "std", "p99", "p999", "beyond_sigmas"), 0.0)
        return {**counted, **zeros, "kurtosis": None}
    mean = float(values.dot(counts)) / n
    squares = (values - mean).square()
    variance = float(squares.dot(counts)) / n
    fourth = float(squares.square().dot(counts)) / n
    magnitudes, order = values.abs().sort()
    ranks = torch.searchsorted(counts[order].cumsum(0), torch.tensor([0.99 * n, 0.999 * n]).double())
    p99, p999 = magnitudes[ranks].tolist()
    return {
        **counted,
        "mean": mean,
        "mean_abs": float(values.abs().dot(counts)) / n,
        "std": variance**0.5,
        "kurtosis": fourth / variance**2 if variance else None,  # 3 for a normal distribution
        "p99": p99,
        "p999": p999,
        "beyond_sigmas": int(counts[squares > sigmas**2 * variance].sum()) if variance else 0,
    }


def _worst_channel(maxima: Tensor) -> dict[str, float]:
    """The channel with the largest magnitude, and how far it stands above the median channel's."""
    median = float(maxima.median())
    return {
        "index": int(maxima.argmax()),
        "max": float(maxima.max()),
        "over_median": float(maxima.max()) / median if median else 0.0,
    }

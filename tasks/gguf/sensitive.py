"""Better types for the tensors whose outputs quantization changes most, within a number of bytes.

errors = {"blk.0.ffn_down.weight": {"q4_0": 0.08, "q8_0": 0.005}}    # measured by the outliers stage
steps = best_raises(tensors, errors, spare=200_000)
"""

import json
import re
from collections.abc import Iterable
from typing import NamedTuple

from tasks.engine.runtimes.ggml_types import TYPES, fitting_type, tensor_bytes

RAISED_TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")
ALIGNMENT = 32
Errors = dict[str, dict[str, float]]


class RaisedType(NamedTuple):
    """A better type for a tensor: additional bytes in the file, relative error of its output before and after."""

    name: str
    before: str
    after: str
    bytes: int
    error_before: float
    error_after: float

    @property
    def override(self) -> tuple[str, str]:
        """The entry of the config's `overrides` that has the same effect."""
        return f"^{re.escape(self.name)}$", self.after


def best_raises(tensors: Iterable[tuple[str, str, tuple[int, ...]]], errors: Errors, spare: float) -> list[RaisedType]:
    """Better types for (name, type, shape) `tensors` within `spare` bytes, the largest error first.

    Greedy: each step is the one that reduces the squared relative error most per byte. Errors of layers' outputs add up
    in squares as far as they are independent.
    """
    sensitive = {name: (type_, shape) for name, type_, shape in tensors if name in errors}
    types = {name: type_ for name, (type_, _) in sensitive.items()}

    def squared(name: str, type_: str) -> float:
        return _error(type_, sensitive[name][1][0], errors[name]) ** 2

    def size(name: str, type_: str) -> int:
        return _padded(type_, sensitive[name][1])

    while True:
        steps = []
        for name, (_, shape) in sensitive.items():
            for type_ in {fitting_type(candidate, shape[0]) for candidate in RAISED_TYPES}:
                extra = size(name, type_) - size(name, types[name])
                reduction = squared(name, types[name]) - squared(name, type_)
                if 0 < extra <= spare and reduction > 0:
                    steps.append((reduction / extra, extra, name, type_))
        if not steps:
            break
        _, extra, name, type_ = max(steps)
        types[name], spare = type_, spare - extra
    raised = [
        RaisedType(
            name, type_, types[name], size(name, types[name]) - size(name, type_),
            squared(name, type_) ** 0.5, squared(name, types[name]) ** 0.5,
        )
        for name, (type_, _) in sensitive.items()
        if types[name] != type_
    ]  # fmt: skip
    return sorted(raised, key=lambda step: -step.error_before)


def sentence(steps: list[RaisedType] | tuple[RaisedType, ...]) -> str:
    """The raised tensors and their bytes in a sentence."""
    names = ", ".join(f"{step.name} {step.before} to {step.after}" for step in steps[:3])
    suffix = f" and {len(steps) - 3} more" if len(steps) > 3 else ""
    return f"{names}{suffix}, for {sum(step.bytes for step in steps) / 1e3:.1f} kB"


def markdown(steps: list[RaisedType] | tuple[RaisedType, ...], applied: bool) -> str:
    """A table of raised types, and the overrides that have the same effect."""
    status = "are raised in this file" if applied else 'would gain most; `{"sensitive": "raise"}` raises them'
    lines = [f"The tensors that the audit's verdict calls sensitive, and which {status}.", ""]
    lines += ["| tensor | from | to | bytes more | error of its output before | after |", "|---|---|---|---|---|---|"]
    for step in steps:
        errors = f"{step.error_before:.2%} | {step.error_after:.2%}"
        lines.append(f"| {step.name} | {step.before} | {step.after} | {step.bytes} | {errors} |")
    overrides = json.dumps(dict(step.override for step in steps))
    return "\n".join([*lines, "", f"As overrides: `{overrides}`"])


def _error(type_: str, row: int, errors: dict[str, float]) -> float:
    """Relative error of a type: measured, or from the measured type of nearest size, where a bit more halves it."""
    measured = {fitting_type(name.upper(), row): error for name, error in errors.items() if name.upper() in TYPES}
    if not measured:
        return 0.0
    nearest = min(measured, key=lambda name: abs(_bits(name) - _bits(type_)))
    return float(measured[nearest] * 2.0 ** (_bits(nearest) - _bits(type_)))


def _bits(type_: str) -> float:
    return 8 * TYPES[type_].bytes / TYPES[type_].block


def _padded(type_: str, shape: tuple[int, ...]) -> int:
    return -(-tensor_bytes(type_, shape) // ALIGNMENT) * ALIGNMENT

"""Which tensors deserve a better type: what the outliers stage measured of them, and what a budget has left.

errors = {"blk.0.ffn_down.weight": {"q4_0": 0.08, "q8_0": 0.005}}    # tasks.gguf.audit_verdict reads them
steps = raises(tensors, errors, spare=200_000)                       # what 200 kB buy, best per byte
"""

import json
import re
from collections.abc import Iterable
from typing import NamedTuple

from tasks.engine.runtimes.ggml_types import TYPES, fitting, tensor_bytes

BETTER = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")
ALIGNMENT = 32
Errors = dict[str, dict[str, float]]


class Raise(NamedTuple):
    """A better type for a tensor: `bytes` more in the file, relative error of its output before and after."""

    name: str
    before: str
    after: str
    bytes: int
    error_before: float
    error_after: float

    @property
    def override(self) -> tuple[str, str]:
        """As in the config's `overrides`."""
        return f"^{re.escape(self.name)}$", self.after


def raises(tensors: Iterable[tuple[str, str, tuple[int, ...]]], errors: Errors, spare: float) -> list[Raise]:
    """Better types for (name, type, shape) `tensors`, as many as `spare` bytes buy.

    One step after the other, each the one that takes most squared relative error away for a byte; errors of layers'
    outputs add up in squares as far as they are independent. The largest error comes first.
    """
    given = {name: (type_, shape) for name, type_, shape in tensors if name in errors}
    now = {name: type_ for name, (type_, _) in given.items()}

    def squared(name: str, type_: str) -> float:
        return _error(type_, given[name][1][0], errors[name]) ** 2

    def size(name: str, type_: str) -> int:
        return _padded(type_, given[name][1])

    while True:
        steps = []
        for name, (_, shape) in given.items():
            for type_ in {fitting(better, shape[0]) for better in BETTER}:
                extra, drop = size(name, type_) - size(name, now[name]), squared(name, now[name]) - squared(name, type_)
                if 0 < extra <= spare and drop > 0:
                    steps.append((drop / extra, extra, name, type_))
        if not steps:
            break
        _, extra, name, type_ = max(steps)
        now[name], spare = type_, spare - extra
    found = [
        Raise(
            name, type_, now[name], size(name, now[name]) - size(name, type_),
            squared(name, type_) ** 0.5, squared(name, now[name]) ** 0.5,
        )
        for name, (type_, _) in given.items()
        if now[name] != type_
    ]  # fmt: skip
    return sorted(found, key=lambda one: -one.error_before)


def sentence(steps: list[Raise] | tuple[Raise, ...]) -> str:
    """What is raised, and for how much."""
    shown = ", ".join(f"{one.name} {one.before} to {one.after}" for one in steps[:3])
    more = f" and {len(steps) - 3} more" if len(steps) > 3 else ""
    return f"{shown}{more}, for {sum(one.bytes for one in steps) / 1e3:.1f} kB"


def markdown(steps: list[Raise] | tuple[Raise, ...], applied: bool) -> str:
    """A table of the steps, and the overrides that stand for them."""
    what = "are raised in this file" if applied else 'would gain most; `{"sensitive": "raise"}` raises them'
    lines = [f"The tensors that the audit's verdict calls sensitive, and which {what}.", ""]
    lines += ["| tensor | from | to | bytes more | error of its output before | after |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {one.name} | {one.before} | {one.after} | {one.bytes} | {one.error_before:.2%} | {one.error_after:.2%} |"
        for one in steps
    ]
    overrides = json.dumps(dict(one.override for one in steps))
    return "\n".join([*lines, "", f"As overrides: `{overrides}`"])


def _error(type_: str, row: int, errors: dict[str, float]) -> float:
    """Measured where the outliers stage tried the type, else from the nearest that it tried: a bit more halves it."""
    tried = {fitting(name.upper(), row): error for name, error in errors.items() if name.upper() in TYPES}
    if not tried:
        return 0.0
    nearest = min(tried, key=lambda name: abs(_bits(name) - _bits(type_)))
    return float(tried[nearest] * 2.0 ** (_bits(nearest) - _bits(type_)))


def _bits(type_: str) -> float:
    return 8 * TYPES[type_].bytes / TYPES[type_].block


def _padded(type_: str, shape: tuple[int, ...]) -> int:
    return -(-tensor_bytes(type_, shape) // ALIGNMENT) * ALIGNMENT

"""Conversion plans as Markdown: a table of kinds, and a table of one plan's tensors."""

import math
from typing import Any

from tasks.core.plain_text import markdown as escape
from tasks.gguf.conversion_plan import ConversionPlan
from tasks.gguf.kinds import KINDS


def markdown(plans: list[ConversionPlan]) -> str:
    """A table of kinds: megabytes, bytes, bits per weight, types, number of fallbacks, need of an imatrix."""
    lines = ["| kind | MB | bytes | bits a weight | tensors | fall back | |", "|---|---|---|---|---|---|---|"]
    for plan in plans:
        weights = sum(math.prod(tensor.shape) for tensor in plan.tensors)
        types = ", ".join(f"{count} {name}" for name, count in plan.types.items())
        needs = "needs an imatrix" if KINDS[plan.kind].needs_imatrix or plan.needs_imatrix else ""
        numbers = f"{plan.bytes / 1e6:.1f} | {plan.bytes} | {8 * plan.bytes / weights:.2f}"
        lines.append(f"| {plan.kind} | {numbers} | {types} | {len(plan.fell_back)} | {needs} |")
    return "\n".join(lines)


def tensors_markdown(plan: ConversionPlan) -> str:
    """A table of a plan's tensors; the same tensor of several layers is one line."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for tensor in plan.tensors:
        layer, _, suffix = tensor.name.removeprefix("blk.").partition(".")
        name, layer = (f"blk.*.{suffix}", layer) if tensor.name.startswith("blk.") else (tensor.name, "")
        key = (name, tensor.shape, tensor.source, tensor.preferred, tensor.type, tensor.bytes)
        groups.setdefault(key, []).append(layer)
    lines = ["| tensor | layers | shape | from | preferred | type | bytes each |", "|---|---|---|---|---|---|---|"]
    for (name, shape, source, preferred, type_, size), layers in groups.items():
        numbers = "all" if len(layers) == max(map(len, groups.values())) > 1 else ", ".join(layers)
        bold = f"**{type_}**" if preferred != type_ else type_
        lines.append(
            f"| {escape(name)} | {numbers} | {' x '.join(map(str, shape))} | {source} | {preferred} | {bold} | {size} |"
        )
    return "\n".join(lines)

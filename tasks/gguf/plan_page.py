"""Plans as Markdown: a table of kinds, a table of one plan's tensors."""

import math
from typing import Any

from tasks.gguf.conversion_plan import Plan
from tasks.gguf.kinds import NEED_IMATRIX


def markdown(plans: list[Plan]) -> str:
    """A table of kinds: megabytes, bytes, bits a weight, types, what falls back, and whether it needs an imatrix."""
    lines = ["| kind | MB | bytes | bits a weight | tensors | fall back | |", "|---|---|---|---|---|---|---|"]
    for plan in plans:
        weights = sum(math.prod(tensor.shape) for tensor in plan.tensors)
        types = ", ".join(f"{count} {name}" for name, count in plan.types.items())
        needs = "needs an imatrix" if plan.wanted.kind in NEED_IMATRIX or plan.needs_imatrix else ""
        numbers = f"{plan.bytes / 1e6:.1f} | {plan.bytes} | {8 * plan.bytes / weights:.2f}"
        lines.append(f"| {plan.wanted.kind} | {numbers} | {types} | {len(plan.fell_back)} | {needs} |")
    return "\n".join(lines)


def tensors_markdown(plan: Plan) -> str:
    """A table of the tensors, those of a layer as one line with the layers that are alike."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for tensor in plan.tensors:
        layer, _, rest = tensor.name.removeprefix("blk.").partition(".")
        own = (f"blk.*.{rest}", layer) if tensor.name.startswith("blk.") else (tensor.name, "")
        key = (own[0], tensor.shape, tensor.source, tensor.asked, tensor.type, tensor.bytes)
        alike.setdefault(key, []).append(own[1])
    lines = ["| tensor | layers | shape | from | asked | becomes | bytes each |", "|---|---|---|---|---|---|---|"]
    for (name, shape, source, asked, type_, size), layers in alike.items():
        shown = "all" if len(layers) == max(map(len, alike.values())) > 1 else ", ".join(layers)
        becomes = f"**{type_}**" if asked != type_ else type_
        lines.append(f"| {name} | {shown} | {' x '.join(map(str, shape))} | {source} | {asked} | {becomes} | {size} |")
    return "\n".join(lines)

"""Which kind: the user's, or under `auto` the best for a budget; and what the outliers stage's verdict says of it."""

import json
from pathlib import Path
from typing import Any

from tasks.core.errors import BadConfig
from tasks.gguf import GgufConfig
from tasks.gguf.convert import Conversion
from tasks.gguf.kinds import NEED_IMATRIX
from tasks.gguf.plan import Plan, require_imatrix

LADDER = (
    "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_0", "Q3_K_M", "IQ3_M", "Q3_K_S",
    "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XS", "IQ1_M",
)  # fmt: skip


def candidates(config: GgufConfig, conversion: Conversion, texts: dict[str, str], imatrix: Path | None) -> list[Plan]:
    """Plans to try in turn; one, unless the kind is `auto`.

    Raises BadConfig when none fits `budget_mb`, ValueError for a kind that needs an importance matrix.
    """
    plans = []
    for kind in LADDER if config.kind == "auto" else [config.kind]:
        wanted = conversion.skeleton.wanted(
            kind, imatrix=imatrix is not None, embedding_type=config.embedding_type, output_type=config.output_type,
            overrides=tuple(config.overrides.items()),
        )  # fmt: skip
        plans.append(conversion.plan(wanted, texts, imatrix if kind != "BF16" else None))
    if config.kind == "auto":
        plans = [one for one in plans if imatrix or not (one.wanted.kind in NEED_IMATRIX or one.needs_imatrix)]
        plans = list({tuple(tensor.type for tensor in one.tensors): one for one in reversed(plans)}.values())
    for plan in plans:
        require_imatrix(plan)
    fitting = [plan for plan in plans if config.budget_mb is None or plan.bytes <= config.budget_mb * 1e6]
    if not fitting:
        smallest = min(plans, key=lambda plan: plan.bytes)
        raise BadConfig(
            f"no file fits budget_mb={config.budget_mb:g}: {smallest.wanted.kind} would have "
            f"{smallest.bytes / 1e6:.1f} MB. Take a smaller kind, set embedding_type (the embedding is most of a small "
            "model), or raise the budget"
        )
    by_quality = config.max_mean_kl is not None or config.min_top1 is not None
    fitting.sort(key=lambda plan: plan.bytes, reverse=not by_quality)
    return fitting if by_quality else fitting[:1]


def verdict_warnings(kind: str, outliers: Path | None) -> list[str]:
    """What the outliers stage's verdict says against serving this kind; of an F16 file also what nobody measured."""
    file = outliers / "verdict.json" if outliers else None
    if file is None or not file.is_file():
        unseen = "F16: Gemma 3's activations can pass float16's 65504, which nobody looked at here: give --outliers DIR"
        return [unseen] if kind == "F16" else []
    verdict: Any = json.loads(file.read_text())
    targets = verdict["models"][verdict["focus"]]["targets"]
    where = {"gguf_cpu": "llama.cpp on a CPU", "gguf_fp16": "a backend that multiplies in float16"}
    if kind == "F16":
        where["fp16"] = "float16"
    found = []
    for target, name in where.items():
        said = targets.get(target, {"verdict": "unknown", "because": [], "do": []})
        if said["verdict"] in ("risky", "unsafe"):
            because, do = "; ".join(said["because"]), "; ".join(said["do"])
            found.append(f"{verdict['focus']} is {said['verdict']} on {name}: {because}{'. ' + do if do else ''}")
    return found

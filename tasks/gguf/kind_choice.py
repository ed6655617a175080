"""Which kind and types: the user's, or the best for a budget, with or without the tensors raised that are sensitive."""

import re
from pathlib import Path

from tasks.core.errors import BadConfig
from tasks.gguf import GgufConfig
from tasks.gguf.audit_verdict import verdict_errors
from tasks.gguf.conversion_plan import Plan, Skeleton, make_plan, require_imatrix
from tasks.gguf.convert import Conversion
from tasks.gguf.kinds import NEED_IMATRIX
from tasks.gguf.sensitive import raises

LADDER = (
    "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_0", "Q3_K_M", "IQ3_M", "Q3_K_S",
    "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XS", "IQ1_M",
)  # fmt: skip


def candidates(
    config: GgufConfig,
    conversion: Conversion,
    texts: dict[str, str],
    imatrix: Path | None,
    outliers: Path | None = None,
) -> list[Plan]:
    """Plans to try in turn; one, unless the kind is `auto`. Each has the verdict's advice, or has followed it.

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
    chosen = fitting if by_quality else fitting[:1]
    chosen = [advised(config, plan, conversion.skeleton, outliers) for plan in chosen]
    if config.sensitive == "recommend":
        return chosen
    followed = [raised(plan, conversion.skeleton) for plan in chosen]
    if config.kind != "auto" or not by_quality:
        return followed
    both = {tuple(tensor.type for tensor in plan.tensors): plan for plan in [*followed, *chosen]}
    return sorted(both.values(), key=lambda plan: plan.bytes)


def advised(config: GgufConfig, plan: Plan, skeleton: Skeleton, outliers: Path | None) -> Plan:
    """The plan with better types for tensors that the verdict calls sensitive: what `budget_mb` has left buys, or else
    `sensitive_percent` of the file. Tensors that the config names itself are left alone."""
    errors = verdict_errors(outliers, skeleton.architecture, skeleton.layers)
    named = [tensor for tensor in plan.tensors if not any(re.search(one, tensor.name) for one in config.overrides)]
    spare = plan.bytes * config.sensitive_percent / 100
    if config.budget_mb is not None:
        spare = config.budget_mb * 1e6 - plan.bytes
    return plan._replace(advice=tuple(raises([(one.name, one.type, one.shape) for one in named], errors, spare)))


def raised(plan: Plan, skeleton: Skeleton) -> Plan:
    """The plan that follows its advice."""
    if not plan.advice:
        return plan
    overrides = (*plan.wanted.overrides, *(step.override for step in plan.advice))
    followed = make_plan(skeleton, plan.wanted._replace(overrides=overrides), plan.texts, plan.imatrix)
    return followed._replace(advice=plan.advice, raised=True)

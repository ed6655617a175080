"""Chooses kind and types: the config's, or the best for a budget, with or without sensitive tensors raised."""

import re
from pathlib import Path

from tasks.core.errors import BadConfig
from tasks.gguf import GgufConfig
from tasks.gguf.audit_verdict import verdict_errors
from tasks.gguf.conversion_plan import ConversionPlan, ModelLayout, make_plan, require_imatrix
from tasks.gguf.kinds import KINDS
from tasks.gguf.sensitive import best_raises


def candidate_plans(
    config: GgufConfig,
    layout: ModelLayout,
    texts: dict[str, str],
    imatrix: Path | None,
    outliers: Path | None = None,
) -> list[ConversionPlan]:
    """Plans to try in turn, a single one unless the kind is `auto`, each with the verdict's advice or following it.

    Raises BadConfig when none fits `budget_mb`, ValueError for a kind that needs an importance matrix.
    """
    fitting = _within_budget(config, _plans(config, layout, texts, imatrix))
    by_quality = config.max_mean_kl is not None or config.min_top1 is not None
    fitting.sort(key=lambda plan: plan.bytes, reverse=not by_quality)
    plans = fitting if by_quality else fitting[:1]
    plans = [with_advice(config, plan, layout, outliers) for plan in plans]
    if config.sensitive == "recommend":
        return plans
    raised = [with_raised_types(plan, layout) for plan in plans]
    if config.kind != "auto" or not by_quality:
        return raised
    by_types = {tuple(tensor.type for tensor in plan.tensors): plan for plan in [*raised, *plans]}
    return sorted(by_types.values(), key=lambda plan: plan.bytes)


def _plans(
    config: GgufConfig, layout: ModelLayout, texts: dict[str, str], imatrix: Path | None
) -> list[ConversionPlan]:
    """The plan of the config's kind, or those of `auto` that differ and can be made."""
    plans = []
    automatic = [name for name, kind in KINDS.items() if kind.auto]
    for kind in automatic if config.kind == "auto" else [config.kind]:
        options = layout.options(
            kind, imatrix=imatrix is not None, embedding_type=config.embedding_type, output_type=config.output_type,
            overrides=tuple(config.overrides.items()),
        )  # fmt: skip
        plans.append(make_plan(layout, options, texts, imatrix if kind != "BF16" else None))
    if config.kind == "auto":
        plans = [plan for plan in plans if imatrix or not (KINDS[plan.kind].needs_imatrix or plan.needs_imatrix)]
        plans = list({tuple(tensor.type for tensor in plan.tensors): plan for plan in reversed(plans)}.values())
    for plan in plans:
        require_imatrix(plan)
    return plans


def _within_budget(config: GgufConfig, plans: list[ConversionPlan]) -> list[ConversionPlan]:
    fitting = [plan for plan in plans if config.budget_mb is None or plan.bytes <= config.budget_mb * 1e6]
    if not fitting:
        smallest = min(plans, key=lambda plan: plan.bytes)
        raise BadConfig(
            f"no file fits budget_mb={config.budget_mb:g}: {smallest.kind} would have {smallest.bytes / 1e6:.1f} MB. "
            "Take a smaller kind, set embedding_type (the embedding is most of a small model), or raise the budget"
        )
    return fitting


def with_advice(config: GgufConfig, plan: ConversionPlan, layout: ModelLayout, outliers: Path | None) -> ConversionPlan:
    """The plan with advice: better types for sensitive tensors, as far as `budget_mb` or `sensitive_percent` allows.

    Tensors that the config's `overrides` name are left out.
    """
    errors = verdict_errors(outliers, layout.architecture, layout.layers)
    free = [
        tensor for tensor in plan.tensors if not any(re.search(pattern, tensor.name) for pattern in config.overrides)
    ]
    spare = plan.bytes * config.sensitive_percent / 100
    if config.budget_mb is not None:
        spare = config.budget_mb * 1e6 - plan.bytes
    advice = best_raises([(tensor.name, tensor.type, tensor.shape) for tensor in free], errors, spare)
    return plan._replace(advice=tuple(advice))


def with_raised_types(plan: ConversionPlan, layout: ModelLayout) -> ConversionPlan:
    """The plan that follows its advice."""
    if not plan.advice:
        return plan
    overrides = (*plan.options.overrides, *(step.override for step in plan.advice))
    raised = make_plan(layout, plan.options._replace(overrides=overrides), plan.texts, plan.imatrix)
    return raised._replace(advice=plan.advice, raised=True)

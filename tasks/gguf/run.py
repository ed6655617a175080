"""Converts a model to `model.gguf` and proves that llama.cpp with it has the model's logits.

python -m tasks.gguf.run config.json --model DIR --out DIR [--dataset DIR] [--outliers DIR]
"""

import json
from pathlib import Path
from typing import Any

from tasks.core.command import Report, command
from tasks.core.errors import BadConfig, GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.compare.agreement import Agreement
from tasks.engine.data.literal_tokens import text_token_ids
from tasks.engine.models.family_registry import family_of
from tasks.engine.models.model_config import read_config
from tasks.engine.runtimes.ggml_types import FLOATS
from tasks.gguf import GgufConfig
from tasks.gguf.audit_verdict import verdict_warnings
from tasks.gguf.conversion_plan import ConversionPlan, ModelLayout, plans_by_size
from tasks.gguf.convert import Conversion, open_conversion
from tasks.gguf.header import read_header
from tasks.gguf.imatrix import IMATRIX_FILE
from tasks.gguf.kind_choice import candidate_plans
from tasks.gguf.kinds import KINDS
from tasks.gguf.metadata import provenance_values
from tasks.gguf.plan_page import markdown, tensors_markdown
from tasks.gguf.proof import Proof, proof_budget
from tasks.gguf.sensitive import markdown as sensitive_markdown
from tasks.gguf.sensitive import sentence
from tasks.gguf.serving_files import write_serving_files


def convert(
    config: GgufConfig,
    model: ModelDir,
    out: Path,
    job: Job,
    dataset: Path | None = None,
    outliers: Path | None = None,
) -> Report:
    """Writes and proves one GGUF; `outliers` is that stage's output for this model (importance matrix and verdict).

    Without a dataset the proof reads built-in texts. Raises GateFailed with the numbers.
    """
    if model.adapter is not None:
        raise BadConfig(f"{model} is not merged: llama.cpp converts whole models, so run the merge stage first")
    warnings = _unread_settings(model.base)
    imatrix = _imatrix(config, outliers, warnings)
    texts = provenance_values(config, model.base, dataset) | {"general.name": config.name}
    proof = Proof(config, model.base, dataset, job)
    with open_conversion(model.base, config.name, job) as conversion:
        conversion.text_tokens = text_token_ids(proof.tokenizer)
        plans = candidate_plans(config, conversion.layout, texts, imatrix, outliers)
        _write_plan(config, plans[0], conversion.layout, out / "report")
        plan, agreement = _first_that_passes(config, plans, conversion, proof, out / "model.gguf", job)
    texts_kind = "held-out rows" if dataset else "built-in texts"
    warnings += write_serving_files(config, plan, proof.tokenizer, model.base, proof.details, out, texts_kind)
    warnings += proof.warnings + verdict_warnings(plan.kind, outliers)
    facts: dict[str, Any] = {
        "format": plan.kind, "bytes": plan.bytes, "fell_back": len(plan.fell_back),
        "mean_kl": agreement.mean_kl, "top1": agreement.top1,
    }  # fmt: skip
    return Report(
        facts=facts,
        metrics={
            **agreement.metrics(), "bytes": plan.bytes, "fell_back": len(plan.fell_back),
            "conversion_seconds": conversion.seconds, "conversion_peak_bytes": conversion.peak_bytes,
        },
        warnings=warnings,
        details={
            "plan": plan.sentence(), "tensors": plan.table(), "types": plan.types, "proof": proof.details,
            "weighed": len(plan.weighed),
            "sensitive": [step._asdict() for step in plan.advice], "raised": plan.raised,
        },
    )  # fmt: skip


def _unread_settings(model: Path) -> list[str]:
    """A warning for each setting that llama.cpp does not read: the proof's texts may be too short to show it."""
    text = read_config(model).get_text_config()
    differences = family_of(text.model_type).unlike_llama_cpp(text)
    return [f"llama.cpp computes another model than config.json describes: {sentence}" for sentence in differences]


def _first_that_passes(
    config: GgufConfig, plans: list[ConversionPlan], conversion: Conversion, proof: Proof, target: Path, job: Job
) -> tuple[ConversionPlan, Agreement]:
    """Writes and proves the plans in turn until one passes. Raises the last one's GateFailed."""
    for i, plan in enumerate(plans):
        job.log(plan.sentence())
        if plan.advice and not plan.raised:
            job.log(f"the verdict would raise {sentence(plan.advice)}: set sensitive to raise")
        conversion.write(plan, target)
        _check_written(plan, target)
        agreement = proof(target)
        try:
            agreement.require(f"the {plan.kind} GGUF", *proof_budget(config, plan.kind))
        except GateFailed as error:
            if i == len(plans) - 1:
                raise
            job.log(f"{error}; next is {plans[i + 1].kind}")
        else:
            return plan, agreement
    raise AssertionError("there is always a last plan")


def _check_written(plan: ConversionPlan, file: Path) -> None:
    """Raises GateFailed for a file whose size or tensor types are not the plan's."""
    size = file.stat().st_size
    types = {tensor.name: tensor.type for tensor in read_header(file).tensors}
    if size != plan.bytes or types != {tensor.name: tensor.type for tensor in plan.tensors}:
        raise GateFailed(f"{file.name} has {size} bytes, planned were {plan.bytes}; or types are not the plan's")


def _imatrix(config: GgufConfig, outliers: Path | None, warnings: list[str]) -> Path | None:
    if outliers is None or not config.imatrix or config.kind in FLOATS:
        return None
    if not (outliers / IMATRIX_FILE).is_file():
        warnings.append(
            f"there is no {IMATRIX_FILE} in the outliers stage's output: quantized without an importance matrix"
        )
        return None
    return outliers / IMATRIX_FILE


def _write_plan(config: GgufConfig, plan: ConversionPlan, layout: ModelLayout, report: Path) -> None:
    """Writes plan.json and plan.md: the plan, its advice, and the sizes of all kinds."""
    report.mkdir(parents=True, exist_ok=True)
    rows = {
        "kind": plan.kind, "bytes": plan.bytes, "types": plan.types, "tensors": plan.table(),
        "sensitive": [step._asdict() for step in plan.advice], "raised": plan.raised,
    }  # fmt: skip
    (report / "plan.json").write_text(json.dumps(rows, indent=1))
    types = {"embedding_type": config.embedding_type, "output_type": config.output_type}
    sizes = markdown(plans_by_size(layout, list(KINDS), **types))
    parts = [f"# {plan.sentence()}", tensors_markdown(plan)]
    parts += ["## Sensitive tensors", sensitive_markdown(plan.advice, plan.raised)] if plan.advice else []
    parts += ["## Other kinds of this model", sizes]
    (report / "plan.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command(convert)

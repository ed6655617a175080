"""Writes `model.gguf` in one of llama.cpp's types and shows that llama.cpp with it says what the model says.

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
from tasks.engine.runtimes.ggml_types import FLOATS
from tasks.gguf import GgufConfig
from tasks.gguf.audit_verdict import verdict_warnings
from tasks.gguf.conversion_plan import Plan, all_sizes
from tasks.gguf.convert import Conversion, converting
from tasks.gguf.header import read_header
from tasks.gguf.imatrix import FILE
from tasks.gguf.kind_choice import candidates
from tasks.gguf.kinds import KINDS
from tasks.gguf.metadata import origin
from tasks.gguf.plan_page import markdown, tensors_markdown
from tasks.gguf.proof import Proof, budget
from tasks.gguf.sensitive import markdown as sensitive_markdown
from tasks.gguf.sensitive import sentence
from tasks.gguf.serving_files import write_recipes


def convert(
    config: GgufConfig,
    model: ModelDir,
    out: Path,
    job: Job,
    dataset: Path | None = None,
    outliers: Path | None = None,
) -> Report:
    """`outliers` is that stage's output for this model: its importance matrix and its verdict.

    Without a dataset the proof reads a few texts of its own. Raises GateFailed with the numbers.
    """
    if model.adapter is not None:
        raise BadConfig(f"{model} is not merged: llama.cpp converts whole models, so run the merge stage first")
    warnings: list[str] = []
    imatrix = _imatrix(config, outliers, warnings)
    texts = origin(config, model.base, dataset) | {"general.name": config.name}
    proof = Proof(config, model.base, dataset, job)
    with converting(model.base, config.name, job) as conversion:
        plans = candidates(config, conversion, texts, imatrix, outliers)
        _write_plan(config, plans[0], conversion, out / "report")
        plan, agreement = _first_that_passes(config, plans, conversion, proof, out / "model.gguf", job)
    what = "held-out rows" if dataset else "built-in texts"
    warnings += write_recipes(config, plan, proof.tokenizer, model.base, proof.details, out, what)
    warnings += proof.warnings + verdict_warnings(plan.wanted.kind, outliers)
    facts: dict[str, Any] = {
        "format": plan.wanted.kind, "bytes": plan.bytes, "fell_back": len(plan.fell_back),
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


def _first_that_passes(
    config: GgufConfig, plans: list[Plan], conversion: Conversion, proof: Proof, target: Path, job: Job
) -> tuple[Plan, Agreement]:
    """Writes and proves one plan after the other; the last one's failure is the stage's."""
    for i, plan in enumerate(plans):
        job.log(plan.sentence())
        if plan.advice and not plan.raised:
            job.log(f"the verdict would raise {sentence(plan.advice)}: set sensitive to raise")
        conversion.write(plan, target)
        _check_written(plan, target)
        agreement = proof(target)
        try:
            agreement.gate(f"the {plan.wanted.kind} GGUF", *budget(config, plan.wanted.kind))
        except GateFailed as error:
            if i == len(plans) - 1:
                raise
            job.log(f"{error}; next is {plans[i + 1].wanted.kind}")
        else:
            return plan, agreement
    raise AssertionError("there is always a last plan")


def _check_written(plan: Plan, file: Path) -> None:
    """Raises GateFailed when the file is not the plan's, to the byte and type."""
    size = file.stat().st_size
    types = {tensor.name: tensor.type for tensor in read_header(file).tensors}
    if size != plan.bytes or types != {tensor.name: tensor.type for tensor in plan.tensors}:
        raise GateFailed(f"{file.name} has {size} bytes, planned were {plan.bytes}; or types are not the plan's")


def _imatrix(config: GgufConfig, outliers: Path | None, warnings: list[str]) -> Path | None:
    if outliers is None or not config.imatrix or config.kind in FLOATS:
        return None
    if not (outliers / FILE).is_file():
        warnings.append(f"there is no {FILE} in the outliers stage's output: quantized without an importance matrix")
        return None
    return outliers / FILE


def _write_plan(config: GgufConfig, plan: Plan, conversion: Conversion, report: Path) -> None:
    report.mkdir(parents=True, exist_ok=True)
    rows = {
        "kind": plan.wanted.kind, "bytes": plan.bytes, "types": plan.types, "tensors": plan.table(),
        "sensitive": [step._asdict() for step in plan.advice], "raised": plan.raised,
    }  # fmt: skip
    (report / "plan.json").write_text(json.dumps(rows, indent=1))
    options = {"embedding_type": config.embedding_type, "output_type": config.output_type}
    sizes = markdown(all_sizes(conversion.skeleton, list(KINDS), **options))
    parts = [f"# {plan.sentence()}", tensors_markdown(plan)]
    parts += ["## Sensitive tensors", sensitive_markdown(plan.advice, plan.raised)] if plan.advice else []
    parts += ["## Other kinds of this model", sizes]
    (report / "plan.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command(convert)

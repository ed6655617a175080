"""Writes `model.gguf` in one of llama.cpp's types and shows that llama.cpp with it says what the model says.

python -m tasks.gguf.run config.json --model DIR --out DIR [--dataset DIR] [--source DIR_WITH_BF16_GGUF]
    [--outliers DIR_WITH_IMATRIX]
"""

import json
from pathlib import Path
from typing import Any

from tasks.core.command import Report, command
from tasks.core.errors import BadConfig, GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.agreement import Agreement
from tasks.gguf import GgufConfig
from tasks.gguf.choice import candidates, verdict_warnings
from tasks.gguf.convert import Conversion, converting
from tasks.gguf.header import read_header
from tasks.gguf.hf import stored_type
from tasks.gguf.imatrix import FILE
from tasks.gguf.kinds import FLOATS, KINDS
from tasks.gguf.metadata import origin
from tasks.gguf.plan import Plan, all_sizes, markdown, tensors_markdown
from tasks.gguf.proof import Proof, budget
from tasks.gguf.serve import write_recipes


def convert(
    config: GgufConfig,
    model: ModelDir,
    out: Path,
    job: Job,
    dataset: Path | None = None,
    source: Path | None = None,
    outliers: Path | None = None,
) -> Report:
    """`source` holds the same model's BF16 `model.gguf` and saves converting it again; `outliers` an imatrix.gguf.

    Without a dataset the proof reads a few texts of its own. Raises GateFailed with the numbers.
    """
    if model.adapter is not None:
        raise BadConfig(f"{model} is not merged: llama.cpp converts whole models, so run the merge stage first")
    warnings: list[str] = []
    imatrix = _imatrix(config, outliers, warnings)
    begin = _source(config, model.base, source, warnings)
    texts = origin(config, model.base, dataset) | {"general.name": config.name}
    proof = Proof(config, model.base, dataset, job)
    with converting(begin, config.name, job) as conversion:
        plans = candidates(config, conversion, texts, imatrix)
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
        metrics={**agreement.metrics(), "bytes": plan.bytes, "fell_back": len(plan.fell_back)},
        warnings=warnings,
        details={"plan": plan.sentence(), "tensors": plan.table(), "types": plan.types, "proof": proof.details},
    )


def _first_that_passes(
    config: GgufConfig, plans: list[Plan], conversion: Conversion, proof: Proof, target: Path, job: Job
) -> tuple[Plan, Agreement]:
    """Writes and proves one plan after the other; the last one's failure is the stage's."""
    for i, plan in enumerate(plans):
        job.log(plan.sentence())
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


def _source(config: GgufConfig, model: Path, source: Path | None, warnings: list[str]) -> Path:
    """What is read: the BF16 file where it holds what the model holds, else the model."""
    if source is None:
        return model
    if not (source / "model.gguf").is_file():
        raise BadConfig(f"{source} holds no model.gguf: give the output of this stage with kind BF16, or no source")
    if config.kind in FLOATS:
        warnings.append(f"source is ignored: {config.kind} is made from the model itself")
        return model
    if stored_type(model) != "BF16":
        warnings.append(f"source is ignored: the model is stored in {stored_type(model)}, which BF16 would round")
        return model
    return source / "model.gguf"


def _write_plan(config: GgufConfig, plan: Plan, conversion: Conversion, report: Path) -> None:
    report.mkdir(parents=True, exist_ok=True)
    rows = {"kind": plan.wanted.kind, "bytes": plan.bytes, "types": plan.types, "tensors": plan.table()}
    (report / "plan.json").write_text(json.dumps(rows, indent=1))
    options = {"embedding_type": config.embedding_type, "output_type": config.output_type}
    sizes = markdown(all_sizes(conversion.skeleton, list(KINDS), **options))
    parts = [f"# {plan.sentence()}", tensors_markdown(plan), "## Other kinds of this model", sizes]
    (report / "plan.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command(convert)

"""Writes `model.gguf` in one of llama.cpp's types and shows that llama.cpp with it says what the model says.

python -m tasks.gguf.run config.json --model DIR --dataset DIR --out DIR [--source DIR_WITH_BF16_GGUF]
"""

import json
from pathlib import Path
from typing import Any

from tasks.core.command import Report, command
from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.gguf import GgufConfig
from tasks.gguf.hf import FLOATS, convert_hf
from tasks.gguf.metadata import Found, origin, stamp
from tasks.gguf.proof import prove
from tasks.gguf.quantize import Planned, plan, quantize, sentence


def convert(
    config: GgufConfig, model: ModelDir, dataset: Path, out: Path, job: Job, source: Path | None = None
) -> Report:
    """`source` holds the same model's BF16 `model.gguf` and saves converting it again. Raises GateFailed."""
    if model.adapter is not None:
        raise BadConfig(f"{model} is not merged: llama.cpp converts whole models, so run the merge stage first")
    raw, planned = job.work / "raw.gguf", []
    warnings = []
    if config.kind in FLOATS:
        if source is not None:
            warnings.append(f"source is ignored: {config.kind} is converted from the model itself")
        convert_hf(model.base, config.kind, config.name, raw, job)
    else:
        bf16 = _bf16(config, model.base, job, source)
        planned = plan(bf16, config.kind, job)
        job.log(sentence(planned, config.kind))
        quantize(bf16, raw, config.kind, job)
        if source is None:
            bf16.unlink()
    found = stamp(raw, out / "model.gguf", origin(config, model.base, dataset) | {"general.name": config.name})
    raw.unlink()
    table = _table(config.kind, planned, found)
    _write(out / "report" / "plan.json", {"kind": config.kind, "tensors": table})
    warnings += [f"{row['name']} became {row['found']}, planned {row['planned']}" for row in table if row["surprise"]]
    agreement = prove(config, out / "model.gguf", model.base, dataset, job)
    fell_back = sum(row["fell_back"] for row in table)
    size = (out / "model.gguf").stat().st_size
    return Report(
        facts={
            "format": config.kind, "bytes": size, "fell_back": fell_back,
            "mean_kl": agreement.mean_kl, "top1": agreement.top1,
        },
        metrics={**agreement.metrics(), "bytes": size, "fell_back": fell_back},
        warnings=warnings,
        details={"plan": sentence(planned, config.kind) if planned else "", "tensors": table, "types": _count(found)},
    )  # fmt: skip


def _bf16(config: GgufConfig, model: Path, job: Job, source: Path | None) -> Path:
    if source is None:
        converted = job.work / "bf16.gguf"
        convert_hf(model, "BF16", config.name, converted, job)
        return converted
    if not (source / "model.gguf").is_file():
        raise BadConfig(f"{source} holds no model.gguf: give the output of this stage with kind BF16, or no source")
    return source / "model.gguf"


def _table(kind: str, planned: list[Planned], found: dict[str, Found]) -> list[dict[str, Any]]:
    plans = {tensor.name: tensor for tensor in planned}
    return [
        {
            "name": name,
            "shape": tensor.shape,
            "bytes": tensor.bytes,
            "found": tensor.type,
            "planned": plans[name].target if name in plans else None,
            "fell_back": name in plans and plans[name].fell_back(kind),
            "surprise": bool(plans) and (name not in plans or plans[name].target != tensor.type),
        }
        for name, tensor in found.items()
    ]


def _count(found: dict[str, Found]) -> dict[str, int]:
    types = [tensor.type for tensor in found.values()]
    return {name: types.count(name) for name in sorted(set(types))}


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
    command(convert)

"""Quantizes one model by one method and says what that cost, beside what the outliers stage's verdict foretold.

python -m tasks.bakeoff.run config.json --model DIR --dataset DIR [--outliers DIR] --out DIR

`config.json`: {"method": "gptq", "dtype": "bfloat16"}. A method whose library is missing, or that fails, is a row too.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tasks.bakeoff import BakeoffConfig
from tasks.bakeoff.methods import METHODS, Source
from tasks.core.command import Report, command
from tasks.core.errors import BadConfig, BadData
from tasks.core.job import Job
from tasks.core.peak_memory import peak_resident
from tasks.core.refs import ModelDir
from tasks.core.rows import read_rows
from tasks.engine.compare.agreement import answer_logits, held_out
from tasks.engine.compare.changed_model import trial
from tasks.engine.data.chat_template import Example, encode
from tasks.engine.models.load import load_model, load_tokenizer, pick_device

WORDS = ("safe", "risky", "unsafe", "unknown")
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, KeyError)
"""What libraries raise when a model is not to their liking: the outcome of a bake-off, not the end of it."""


def bake(
    config: BakeoffConfig, model: ModelDir, dataset: Path, out: Path, job: Job, outliers: Path | None = None
) -> Report:
    """Writes `row.json`; `outliers` is that stage's output for this model."""
    if model.adapter is not None:
        raise BadConfig(f"{model} is not merged: merge it first, methods quantize whole models")
    tokenizer = load_tokenizer(model)
    examples = [encode(tokenizer, row) for row in held_out(dataset, config.rows)]
    file = next((one for one in ("calibration.jsonl", "train.jsonl") if (dataset / one).is_file()), None)
    rows = [encode(tokenizer, row).input_ids for row in read_rows(dataset / file)] if file else []
    if not rows:
        raise BadData(f"{dataset} has no rows in calibration.jsonl or train.jsonl to calibrate on")
    step = max(1, len(rows) // config.calibration_rows)
    rows = [ids[: config.max_length] for ids in rows[::step][: config.calibration_rows]]
    device = pick_device()
    reference_model = load_model(model, "float32", device)
    reference = [answer_logits(reference_model, example) for example in examples]
    del reference_model
    row: dict[str, Any] = {"method": config.method, "dtype": config.dtype, "device": device}
    row |= foretold(config, outliers)
    try:
        row |= tried(config, Source(model.base, getattr(torch, config.dtype), device, rows), examples, reference, job)
    except ImportError as error:
        row["skipped"] = f"not installed: {error.name or error}"
    except FAILURES as error:
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else 'no message'}"
    (out / "row.json").write_text(json.dumps(row, indent=1))
    told = row.get("skipped") or row.get("failed")
    numbers = {key: float(value) for key, value in row.items() if isinstance(value, (int, float))}
    return Report(metrics=numbers, warnings=[f"{config.method}: {told}"] if told else [], details={"row": row})


def tried(
    config: BakeoffConfig, source: Source, examples: list[Example], reference: list[torch.Tensor], job: Job
) -> dict[str, Any]:
    """The quantized model's numbers."""
    if source.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    job.log(f"{config.method} in {config.dtype} on {source.device}")
    start = time.perf_counter()
    made = METHODS[config.method](source)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if source.device == "cuda" else peak_resident()
    outcome = trial(made.model, examples, reference)
    speed = tokens_per_second(made.model, examples[0].input_ids[:16], config.speed_tokens)
    return {"bytes": made.bytes, "seconds": seconds, "peak_bytes": peak, **outcome, **speed}


def tokens_per_second(model: PreTrainedModel, prompt: list[int], tokens: int) -> dict[str, float]:
    """Greedy, one row: `tokens` generated after a first few that warm up."""
    if not tokens:
        return {}
    ids = torch.tensor([prompt], device=model.device)
    options: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=4, min_new_tokens=4, **options)  # type: ignore[operator]
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)  # type: ignore[operator]
    if ids.is_cuda:
        torch.cuda.synchronize()
    return {"tokens_per_second": tokens / (time.perf_counter() - start)}


def foretold(config: BakeoffConfig, outliers: Path | None) -> dict[str, str]:
    """The verdict that covers this method and dtype: `predicted` and the reason."""
    if outliers is None:
        return {}
    verdict = json.loads((outliers / "verdict.json").read_text())
    targets = verdict["models"][verdict["focus"]]["targets"]
    concerned = [{"bfloat16": "bf16", "float16": "fp16", "float32": "gguf_cpu"}[config.dtype]]
    if config.method.startswith("quanto") and config.method.endswith("uncalibrated"):
        return {"predicted": "unsafe", "because": "int8 activations without calibration have no scales"}
    if config.method in ("quanto-int8", "quanto-int4", "torchao-int8-activations"):
        concerned.append("int8_activations")
    worst = max((targets[name] for name in concerned), key=lambda said: WORDS.index(said["verdict"]))
    return {"predicted": worst["verdict"], "because": worst["because"][0]}


if __name__ == "__main__":
    command(bake)

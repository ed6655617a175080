"""Quantizes a model by one method and measures the cost, beside the outcome that the outlier audit predicts.

python -m tasks.bakeoff.run config.json --model DIR --dataset DIR [--outliers DIR] --out DIR

`config.json`: {"method": "gptq", "dtype": "bfloat16"}. A method that cannot run here, or fails, is a row that says so.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.bakeoff import METHODS, BakeoffConfig
from tasks.bakeoff.prediction import predict
from tasks.bakeoff.source_model import SourceModel
from tasks.core.command import Report, command
from tasks.core.errors import BadConfig, BadData
from tasks.core.job import Job
from tasks.core.peak_memory import peak_resident
from tasks.core.refs import ModelDir
from tasks.core.rows import read_rows
from tasks.engine.compare.agreement import answer_logits, test_rows
from tasks.engine.compare.changed_model import compare_answers
from tasks.engine.data.chat_template import Example, encode
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models.dtypes import pick_device
from tasks.engine.models.load import load_model

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, KeyError)
"""What libraries raise for a model that they do not support: an outcome of the bake-off, not an error of the stage."""


def bake(
    config: BakeoffConfig, model: ModelDir, dataset: Path, out: Path, job: Job, outliers: Path | None = None
) -> Report:
    """Writes `row.json`; `outliers` is that stage's output for this model."""
    if model.adapter is not None:
        raise BadConfig(f"{model} is not merged: merge it first, methods quantize whole models")
    method, device = METHODS[config.method], pick_device()
    row: dict[str, Any] = {"method": method.name, "title": method.title, "dtype": config.dtype, "device": device}
    if outliers is not None:
        row |= predict(method, config.dtype, json.loads((outliers / "verdict.json").read_text()))
    tokenizer = load_tokenizer(model)
    examples = [encode(tokenizer, example) for example in test_rows(dataset, config.rows)]
    source = SourceModel(model.base, getattr(torch, config.dtype), device, calibration_rows(config, tokenizer, dataset))
    if reason := method.cannot_run(device):
        row["skipped"] = reason
    else:
        reference_model = load_model(model, "float32", device)
        reference = [answer_logits(reference_model, example) for example in examples]
        del reference_model
        try:
            row |= measure(config, source, examples, reference, job)
        except ImportError as error:
            row["skipped"] = f"not installed: {error.name or error}"
        except FAILURES as error:
            message = str(error).splitlines()[0][:300] if str(error) else "no message"
            row["failed"] = f"{type(error).__name__}: {message}"
    (out / "row.json").write_text(json.dumps(row, indent=1))
    problem = row.get("skipped") or row.get("failed")
    numbers = {key: float(value) for key, value in row.items() if isinstance(value, (int, float))}
    warnings = [f"{method.name}: {problem}"] if problem else []
    return Report(metrics=numbers, warnings=warnings, details={"row": row})


def calibration_rows(config: BakeoffConfig, tokenizer: PreTrainedTokenizerBase, dataset: Path) -> list[list[int]]:
    """Token ids of rows evenly spread over the calibration file."""
    files = ("calibration.jsonl", "train.jsonl")
    file = next((name for name in files if (dataset / name).is_file()), None)
    rows = [encode(tokenizer, row).input_ids for row in read_rows(dataset / file)] if file else []
    if not rows:
        raise BadData(f"{dataset} has no rows in calibration.jsonl or train.jsonl to calibrate on")
    step = max(1, len(rows) // config.calibration_rows)
    return [ids[: config.max_length] for ids in rows[::step][: config.calibration_rows]]


def measure(
    config: BakeoffConfig, source: SourceModel, examples: list[Example], reference: list[torch.Tensor], job: Job
) -> dict[str, Any]:
    """Bytes, seconds, peak memory, agreement with the float32 model, and tokens a second of the quantized model."""
    method = METHODS[config.method]
    if source.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    job.log(f"{method.title} in {config.dtype} on {source.device}")
    start = time.perf_counter()
    quantized = method.quantize(source)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if source.device == "cuda" else peak_resident()
    agreement = compare_answers(quantized.model, examples, reference)
    speed = tokens_per_second(quantized.model, examples[0].input_ids[:16], config.speed_tokens)
    return {"bytes": quantized.bytes, "seconds": seconds, "peak_bytes": peak, **agreement, **speed}


def tokens_per_second(model: PreTrainedModel, prompt: list[int], tokens: int) -> dict[str, float]:
    """Speed of greedy decoding of one row over `tokens` tokens, after four that warm up."""
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


if __name__ == "__main__":
    command(bake)

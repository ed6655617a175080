"""Asks a model, or its GGUF file in llama.cpp, the held-out questions and scores its answers.

python -m tasks.evaluate.run config.json --model DIR[+ADAPTER] --dataset DIR --out DIR [--gguf DIR]
"""

import json
import os
from pathlib import Path
from typing import Any

from tasks.core.command import Report, command
from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Row, read_rows
from tasks.engine.chat import end_ids, prompt_ids
from tasks.engine.load import load_tokenizer, read_config
from tasks.evaluate import EvaluateConfig
from tasks.evaluate.asked import Answered, Asked, check_lengths
from tasks.evaluate.hf import answer_hf
from tasks.evaluate.llama import answer_llama
from tasks.evaluate.report import plot_confusion, write_mistakes
from tasks.evaluate.scores import Judged, judge, score

MAIN = ("json_valid", "intent_accuracy", "exact_match", "out_of_scope_recall")


def evaluate(
    config: EvaluateConfig, model: ModelDir, dataset: Path, out: Path, job: Job, gguf: Path | None = None
) -> Report:
    """`gguf` holds `model.gguf`, made from `model`, whose tokenizer and chat template make the prompts of both.

    Raises BadData for a dataset without held-out rows, GateFailed when logits are NaN or infinite.
    """
    rows = _held_out(dataset, config.limit_rows)
    tokenizer, model_config = load_tokenizer(model), read_config(model.base)
    asked = Asked(
        rows=list(rows),
        prompts=[prompt_ids(tokenizer, row.prompt) for row in rows.values()],
        ends=frozenset(end_ids(tokenizer, model_config)),
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        warmup_rows=config.warmup_rows,
        threads=config.threads or max(1, len(os.sched_getaffinity(0)) // 2),
    )
    check_lengths(asked, model_config.get_text_config().max_position_embeddings)
    answered = answer_llama(gguf / "model.gguf", asked, job) if gguf else answer_hf(model, asked, job)
    answers = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answered.answers]
    judged = [judge(row.answer, answer) for row, answer in zip(rows.values(), answers, strict=True)]
    scores = score(judged, config.out_of_scope_intent)
    _write(config, rows, answers, judged, scores, out)
    stored = str(model_config.dtype).removeprefix("torch.")
    return _report(scores, answered, _bytes(model, gguf), _kind(gguf) if gguf else stored)


def _held_out(dataset: Path, limit: int | None) -> dict[int, Row]:
    """The rows to ask, by their number in the file, from 0."""
    path = dataset / "test.jsonl"
    if not path.is_file():
        raise BadData(f"{path} is not there: give the output directory of the ingest stage")
    rows = list(read_rows(path))
    if not rows:
        raise BadData(f"{path} is empty: there is nothing to evaluate on")
    asked = min(limit or len(rows), len(rows))
    return {row: rows[row] for row in (i * len(rows) // asked for i in range(asked))}


def _bytes(model: ModelDir, gguf: Path | None) -> int:
    """Bytes of the weights: the GGUF file, or the safetensors of the base and the adapter."""
    if gguf is not None:
        return (gguf / "model.gguf").stat().st_size
    directories = [directory for directory in model if directory is not None]
    return sum(path.stat().st_size for directory in directories for path in directory.glob("*.safetensors"))


def _kind(gguf: Path) -> str:
    """What the GGUF stage says it made."""
    report = gguf / "report.json"
    return str(json.loads(report.read_text())["facts"]["format"]) if report.is_file() else "GGUF"


def _write(
    config: EvaluateConfig,
    rows: dict[int, Row],
    answers: list[str],
    judged: list[Judged],
    scores: dict[str, Any],
    out: Path,
) -> None:
    predictions = [
        {
            "row": number,
            "prompt": row.messages[-2].content,
            "expected": row.answer,
            "answer": answer,
            **checks._asdict(),
        }
        for (number, row), answer, checks in zip(rows.items(), answers, judged, strict=True)
    ]
    with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    (out / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    report = out / "report"
    report.mkdir()
    write_mistakes(predictions, config.mistakes, report / "mistakes.md")
    if scores["confusion"]:
        plot_confusion(scores["confusion"], report / "confusion.png")


def _report(scores: dict[str, Any], answered: Answered, size: int, format_: str) -> Report:
    rates = {name: rate["value"] for name, rate in scores["rates"].items()} | scores["means"]
    speed = round(answered.generated / answered.seconds, 1)
    main = {name: rates[name] for name in MAIN if name in rates}
    return Report(
        facts={**main, "format": format_, "tokens_per_second": speed, "bytes": size, "rows": scores["rows"]},
        metrics={**rates, "tokens_per_second": speed, "bytes": float(size)},
        details={"generated_tokens": answered.generated, "generation_seconds": round(answered.seconds, 3)},
    )


if __name__ == "__main__":
    command(evaluate)

"""Asks a model, or its GGUF file in llama.cpp, the held-out questions and scores its answers.

python -m tasks.evaluate.run config.json --model DIR[+ADAPTER] --dataset DIR --out DIR [--gguf DIR] [--text DIR]
"""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tasks.core.command import Report, command
from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Row, read_rows
from tasks.engine.data.chat_template import end_ids, prompt_ids
from tasks.engine.models.load import load_tokenizer, read_config
from tasks.evaluate import EvaluateConfig
from tasks.evaluate.answer_scores import Judged, json_object, judge
from tasks.evaluate.generation import Asked, Engine, Schema, Text, Whole, check_lengths, spread
from tasks.evaluate.hf_generation import hf_engine
from tasks.evaluate.llama_generation import llama_engine
from tasks.evaluate.measurements import Measured, measure, speeds
from tasks.evaluate.perplexity import answers, windows
from tasks.evaluate.report import plot_confusion, write_mistakes
from tasks.evaluate.schema import checker, held_to, infer_schema
from tasks.evaluate.scores import score
from tasks.evaluate.user_metric import load_metric

MAIN = ("json_valid", "schema_valid", "intent_accuracy", "intent_macro_f1", "entity_f1", "exact_match",
        "out_of_scope_recall", "out_of_scope_precision", "token_f1", "rouge_l", "metric")  # fmt: skip


def evaluate(
    config: EvaluateConfig,
    model: ModelDir,
    dataset: Path,
    out: Path,
    job: Job,
    gguf: Path | None = None,
    text: Path | None = None,
) -> Report:
    """`gguf` holds `model.gguf`, made from `model`, whose tokenizer and chat template make the prompts of both.

    `text` holds general text (*.txt) for the perplexity that shows forgetting. Raises BadData for a dataset without
    held-out rows, GateFailed when weights or logits are NaN or infinite.
    """
    rows = _held_out(dataset, config.limit_rows)
    metric = load_metric(config.metric) if config.metric else None
    learnt = [row.answer for row in read_rows(dataset / "train.jsonl")] if _trains(dataset) else []
    schema = infer_schema(learnt)
    tokenizer, model_config = load_tokenizer(model), read_config(model.base)
    asked = Asked(
        rows=list(rows),
        prompts=[prompt_ids(tokenizer, row.prompt) for row in rows.values()],
        ends=frozenset(end_ids(tokenizer, model_config)),
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        threads=config.threads or max(1, len(os.sched_getaffinity(0)) // 2),
        whole=_whole_json(tokenizer) if config.stop_at_json else None,
    )
    check_lengths(asked, model_config.get_text_config().max_position_embeddings)
    texts = _texts(config, tokenizer, list(rows.values()), text)
    with _engine(config, model, tokenizer, asked, gguf, job) as engine:
        held = held_to(schema, learnt[:100]) if schema is not None else None
        measured = measure(engine, config, asked, held, texts)

    keeps = checker(schema) if schema is not None else None
    judged, said = [], []
    for row, ids in zip(rows.values(), measured.answered.answers, strict=True):
        said.append(_decoded(tokenizer, ids))
        one = judge(row.answer, said[-1], keeps)
        judged.append(one._replace(metric=metric(_question(row), row.answer, said[-1])) if metric else one)
    scores = score(judged, config.out_of_scope_intent)
    scores |= {"perplexity": measured.perplexity, "parameters": measured.statistics}
    if measured.constrained is not None:
        scores["constrained"] = _constrained(config, rows, tokenizer, measured, judged, keeps)
    _write(config, rows, asked, said, judged, scores, schema, out)
    loaded_in = str(model_config.dtype).removeprefix("torch.") if config.load_in == "original" else config.load_in
    format_ = _kind(gguf) if gguf else loaded_in
    return _report(scores, measured, _bytes(model, gguf, measured), format_)


def _engine(
    config: EvaluateConfig,
    model: ModelDir,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    gguf: Path | None,
    job: Job,
) -> AbstractContextManager[Engine]:
    if gguf is not None:
        return llama_engine(gguf / "model.gguf", asked, job)
    return hf_engine(model, tokenizer, asked, config.load_in, job)


def _trains(dataset: Path) -> bool:
    return (dataset / "train.jsonl").is_file()


def _held_out(dataset: Path, limit: int | None) -> dict[int, Row]:
    """The rows to ask, by their number in the file, from 0."""
    path = dataset / "test.jsonl"
    if not path.is_file():
        raise BadData(f"{path} is not there: give the output directory of the ingest stage")
    rows = list(read_rows(path))
    if not rows:
        raise BadData(f"{path} is empty: there is nothing to evaluate on")
    return {place: rows[place] for place in spread(len(rows), limit or len(rows))}


def _whole_json(tokenizer: PreTrainedTokenizerBase) -> Whole:
    """Whether ids decode to a whole JSON object; looked at only where a token closes a brace."""
    closing = frozenset(index for token, index in tokenizer.get_vocab().items() if "}" in token)
    return lambda ids: ids[-1] in closing and json_object(_decoded(tokenizer, ids)) is not None


def _texts(
    config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase, rows: list[Row], text: Path | None
) -> dict[str, Any]:
    """What perplexity is measured on, by name."""
    found: dict[str, list[Text]] = {}
    if config.perplexity_rows:
        found["held_out"] = answers(tokenizer, [rows[place] for place in spread(len(rows), config.perplexity_rows)])
    if text is not None and config.text_tokens:
        found["general"] = windows(tokenizer, text, config.text_tokens)
    return found


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _question(row: Row) -> str:
    return row.messages[-2].content


def _constrained(
    config: EvaluateConfig,
    rows: dict[int, Row],
    tokenizer: PreTrainedTokenizerBase,
    measured: Measured,
    judged: list[Judged],
    keeps: Callable[[Any], bool] | None,
) -> dict[str, Any]:
    """Scores of the rows asked under the schema, and of the same rows without it."""
    assert measured.constrained is not None
    asked = [list(rows.values())[place] for place in measured.held]
    answers_ = [_decoded(tokenizer, ids) for ids in measured.constrained.answers]
    held = [judge(row.answer, answer, keeps) for row, answer in zip(asked, answers_, strict=True)]
    free = [judged[place] for place in measured.held]
    return {name: _rates(score(some, config.out_of_scope_intent)) for name, some in (("held", held), ("free", free))}


def _rates(scores: dict[str, Any]) -> dict[str, Any]:
    return {"rows": scores["rows"], **{name: value["value"] for name, value in _values(scores).items()}}


def _values(scores: dict[str, Any]) -> dict[str, Any]:
    return {**scores["rates"], **scores["means"]}


def _bytes(model: ModelDir, gguf: Path | None, measured: Measured) -> int:
    """Bytes of the weights: the GGUF file, the safetensors of base and adapter, or what 4 or 8 bits left of them."""
    if gguf is not None:
        return (gguf / "model.gguf").stat().st_size
    if {"nf4", "int8"} & measured.statistics["stored_as"].keys():
        return int(measured.statistics["stored_bytes"])
    directories = [directory for directory in model if directory is not None]
    return sum(path.stat().st_size for directory in directories for path in directory.glob("*.safetensors"))


def _kind(gguf: Path) -> str:
    """What the GGUF stage says it made."""
    report = gguf / "report.json"
    return str(json.loads(report.read_text())["facts"]["format"]) if report.is_file() else "GGUF"


def _write(
    config: EvaluateConfig,
    rows: dict[int, Row],
    asked: Asked,
    said: list[str],
    judged: list[Judged],
    scores: dict[str, Any],
    schema: Schema | None,
    out: Path,
) -> None:
    predictions = [
        {"row": number, "prompt": _question(row), "expected": row.answer, "answer": answer, **checks._asdict(),
         "prompt_tokens": len(prompt)}
        for (number, row), prompt, answer, checks in zip(rows.items(), asked.prompts, said, judged, strict=True)
    ]  # fmt: skip
    with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    (out / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    if schema is not None:
        (out / "schema.json").write_text(json.dumps(schema, indent=1), encoding="utf-8")
    report = out / "report"
    report.mkdir()
    write_mistakes(predictions, config.mistakes, report / "mistakes.md")
    if scores["confusion"]:
        plot_confusion(scores["confusion"], report / "confusion.png")


def _report(scores: dict[str, Any], measured: Measured, size: int, format_: str) -> Report:
    rates = {name: value["value"] for name, value in _values(scores).items()}
    perplexities = {f"{name}_perplexity": round(one["perplexity"], 4) for name, one in scores["perplexity"].items()}
    held = {f"constrained_{name}": value for name, value in scores.get("constrained", {}).get("held", {}).items()}
    timings = speeds(measured)
    main = {name: rates[name] for name in MAIN if name in rates}
    facts = {**main, **perplexities, "format": format_, **timings, "bytes": size, "rows": scores["rows"]}
    return Report(
        facts=facts,
        metrics={**rates, **perplexities, **held, **timings, "bytes": float(size)},
        details={
            "generated_tokens": measured.answered.generated,
            "generation_seconds": round(measured.answered.seconds, 3),
            "latencies_ms": [round(1000 * one.total, 2) for one in measured.alone],
            "first_token_ms": [round(1000 * one.first_token, 2) for one in measured.alone],
        },
    )


if __name__ == "__main__":
    command(evaluate)

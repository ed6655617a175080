"""Has a model, or its GGUF file in llama.cpp, answer the held-out questions, and scores the answers.

python -m tasks.evaluate.run config.json --model DIR[+ADAPTER] --dataset DIR --out DIR [--gguf DIR] [--text DIR]
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tasks.core.command import Report, command
from tasks.core.job import Job
from tasks.core.metrics import AnsweredRow, observe
from tasks.core.refs import ModelDir
from tasks.core.rows import Row
from tasks.engine.data.chat_template import answer_opening
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models.model_config import read_config
from tasks.evaluate import EvaluateConfig
from tasks.evaluate.generation import Engine, GenerationRequest
from tasks.evaluate.hf_generation import hf_engine
from tasks.evaluate.inputs import (
    decode_answer,
    generation_request,
    held_out_rows,
    perplexity_texts,
    question,
    training_answers,
)
from tasks.evaluate.llama_generation import llama_engine
from tasks.evaluate.measurements import Measurements, measure
from tasks.evaluate.outputs import gguf_format, model_bytes, report, write_outputs
from tasks.evaluate.schema import SchemaCheck, decoding_schema, infer_schema, schema_validator
from tasks.evaluate.scores import score, values
from tasks.evaluate.user_metric import UserMetric, load_metric


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
    rows = held_out_rows(dataset, config.limit_rows)
    user_metric = load_metric(config.metric) if config.metric else None
    examples = training_answers(dataset)
    schema = infer_schema(examples)
    tokenizer, model_config = load_tokenizer(model), read_config(model.base)
    request = generation_request(config, tokenizer, model_config, rows)
    texts = perplexity_texts(config, tokenizer, list(rows.values()), text)
    with _engine(config, model, tokenizer, request, gguf, job) as engine:
        constraint = decoding_schema(schema, examples[:100]) if schema is not None else None
        measurements = measure(engine, config, request, constraint, texts)

    validator = schema_validator(schema) if schema is not None else None
    opening = answer_opening(tokenizer)
    answers = [decode_answer(tokenizer, ids, opening) for ids in measurements.generation.answers]
    observations = _observations(list(rows.values()), answers, validator, user_metric)
    scores = score(observations, config.out_of_scope_intent)
    cut = measurements.generation.cut
    scores |= {"cut_answers": sum(cut), "max_new_tokens": request.max_new_tokens}
    scores |= {"perplexity": measurements.perplexity, "parameters": measurements.statistics}
    if measurements.constrained is not None:
        scores["constrained"] = _constrained_scores(config, rows, tokenizer, measurements, observations, validator)
    predictions = [
        {"row": number, "prompt": question(row), "expected": row.answer, "answer": answer, **observation,
         "prompt_tokens": len(prompt), "cut": is_cut}
        for (number, row), prompt, answer, observation, is_cut in zip(
            rows.items(), request.prompts, answers, observations, cut, strict=True)
    ]  # fmt: skip
    write_outputs(out, predictions, scores, schema, config.mistakes)
    dtype = str(model_config.dtype).removeprefix("torch.")
    weight_format = gguf_format(gguf) if gguf else dtype if config.load_in == "original" else config.load_in
    return report(scores, measurements, model_bytes(model, gguf, measurements.statistics), weight_format)


def _engine(
    config: EvaluateConfig,
    model: ModelDir,
    tokenizer: PreTrainedTokenizerBase,
    request: GenerationRequest,
    gguf: Path | None,
    job: Job,
) -> AbstractContextManager[Engine]:
    if gguf is not None:
        return llama_engine(gguf / "model.gguf", request, job)
    return hf_engine(model, tokenizer, request, config.load_in, job)


def _observations(
    rows: Sequence[Row], answers: Sequence[str], validator: SchemaCheck | None, user_metric: UserMetric | None
) -> list[dict[str, Any]]:
    return [
        observe(AnsweredRow(question(row), row.answer, answer, validator, user_metric))
        for row, answer in zip(rows, answers, strict=True)
    ]


def _constrained_scores(
    config: EvaluateConfig,
    rows: dict[int, Row],
    tokenizer: PreTrainedTokenizerBase,
    measurements: Measurements,
    observations: list[dict[str, Any]],
    validator: SchemaCheck | None,
) -> dict[str, Any]:
    """Scores of the rows answered under the schema (`held`), and of the same rows without it (`free`)."""
    assert measurements.constrained is not None
    sample = [list(rows.values())[index] for index in measurements.constrained_indices]
    opening = answer_opening(tokenizer)
    answers = [decode_answer(tokenizer, ids, opening) for ids in measurements.constrained.answers]
    groups = {
        "held": _observations(sample, answers, validator, None),
        "free": [observations[index] for index in measurements.constrained_indices],
    }
    scores = {name: score(group, config.out_of_scope_intent) for name, group in groups.items()}
    return {name: {"rows": result["rows"], **values(result)} for name, result in scores.items()}


if __name__ == "__main__":
    command(evaluate)

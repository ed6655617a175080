"""Inputs of an evaluation: held-out rows, their prompts, and the texts for the perplexity."""

import os
import re
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tasks.core.errors import BadData
from tasks.core.metrics.json_values import json_object
from tasks.core.rows import Row, read_rows
from tasks.engine.data.chat_template import answer_opening, prompt_ids, stop_token_ids
from tasks.engine.data.literal_tokens import encode_text
from tasks.evaluate import EvaluateConfig
from tasks.evaluate.generation import CompletionCheck, GenerationRequest, Text, check_lengths, evenly_spaced
from tasks.evaluate.perplexity import expected_answers, windows


def held_out_rows(dataset: Path, limit: int | None) -> dict[int, Row]:
    """The held-out rows by their number in the file, from 0. Raises BadData when there are none."""
    path = dataset / "test.jsonl"
    if not path.is_file():
        raise BadData(f"{path} is not there: give the output directory of the ingest stage")
    rows = list(read_rows(path))
    if not rows:
        raise BadData(f"{path} is empty: there is nothing to evaluate on")
    return {index: rows[index] for index in evenly_spaced(len(rows), limit or len(rows))}


def training_answers(dataset: Path) -> list[str]:
    """The answers of the training rows; none where the dataset has no training rows."""
    path = dataset / "train.jsonl"
    return [row.answer for row in read_rows(path)] if path.is_file() else []


def generation_request(
    config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig, rows: dict[int, Row]
) -> GenerationRequest:
    """The rows' prompts as token ids. Raises BadData when one would not fit into the model's context."""
    context = model_config.get_text_config().max_position_embeddings
    prompts = [prompt_ids(tokenizer, row.prompt) for row in rows.values()]
    opening = answer_opening(tokenizer)
    opening_ids = encode_text(tokenizer, [opening])[0] if opening else []
    limit = config.max_new_tokens
    if limit is None:
        room = context - max(map(len, prompts)) - len(opening_ids)
        limit = max(1, min(room, answer_tokens(tokenizer, [opening + row.answer for row in rows.values()])))
    request = GenerationRequest(
        row_numbers=list(rows),
        prompts=prompts,
        end_ids=frozenset(stop_token_ids(tokenizer, model_config)),
        max_new_tokens=limit,
        batch_size=config.batch_size,
        threads=config.threads or max(1, len(os.sched_getaffinity(0)) // 2),
        is_complete=complete_json(tokenizer, opening) if config.stop_at_json else None,
        opening=tuple(opening_ids),
    )
    check_lengths(request, context)
    return request


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answers: list[str]) -> int:
    """Tokens of the longest answer and its end of turn, and a margin of a quarter (16 at least)."""
    longest = max(map(len, encode_text(tokenizer, answers))) + 1
    return longest + max(16, longest // 4)


def complete_json(tokenizer: PreTrainedTokenizerBase, opening: str = "") -> CompletionCheck:
    """Whether ids decode to a complete JSON object; decoded only where a token closes a brace."""
    closing = frozenset(index for token, index in tokenizer.get_vocab().items() if "}" in token)
    return lambda ids: ids[-1] in closing and json_object(decode_answer(tokenizer, ids, opening)) is not None


def perplexity_texts(
    config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase, rows: list[Row], directory: Path | None
) -> dict[str, Any]:
    """Texts for the perplexity by name: `held_out`, the rows' expected answers; `general`, from `directory`."""
    texts: dict[str, list[Text]] = {}
    if config.perplexity_rows:
        sample = [rows[index] for index in evenly_spaced(len(rows), config.perplexity_rows)]
        texts["held_out"] = expected_answers(tokenizer, sample)
    if directory is not None and config.text_tokens:
        texts["general"] = windows(tokenizer, directory, config.text_tokens)
    return texts


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], opening: str = "") -> str:
    """An answer's ids as text, without special tokens, outer white space, and the template's own `opening`.

    The opening is taken off with any white space in and behind it.
    """
    start = _opening_length(tokenizer, ids, opening) if opening else 0
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def _opening_length(tokenizer: PreTrainedTokenizerBase, ids: list[int], opening: str) -> int:
    """How many of the first ids are `opening`, whatever its white space; 0 where the answer starts otherwise."""
    pattern = re.compile(r"\s*" + r"\s*".join(map(re.escape, opening.split())) + r"\s*")
    lengths = range(1, min(len(ids), len(opening) + 8) + 1)
    matching = [n for n in lengths if pattern.fullmatch(str(tokenizer.decode(ids[:n], skip_special_tokens=False)))]
    return max(matching, default=0)


def question(row: Row) -> str:
    """The user's message before the answer."""
    return row.question

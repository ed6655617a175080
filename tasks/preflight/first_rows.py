"""The first training rows as the stages will see them: their shape, and their length in tokens."""

import json
from collections.abc import Iterator
from itertools import islice

from transformers import PreTrainedTokenizerBase

from tasks.core.data_files import DATA_SUFFIXES, data_suffix
from tasks.core.rows import Row
from tasks.engine.data.chat_template import Example, encode
from tasks.ingest.read import read_file
from tasks.ingest.row_shapes import recognise_shape
from tasks.ingest.turns import to_turns
from tasks.preflight import Check, PreflightConfig, State

FIRST = 200


def first_examples(config: PreflightConfig, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The first rows that can be read, encoded. Raises BadData or ValueError when none can."""
    assert config.rows is not None
    if not data_suffix(config.rows.name):
        raise ValueError(f"{config.rows} is no data file: its name ends in none of {', '.join(DATA_SUFFIXES)}")
    values = [_value(row) for _, row in islice(read_file(config.rows, config.rows.name), FIRST)]
    shape = recognise_shape(values, config.rows.name) if config.format == "auto" else config.format
    examples, problem = [], "no row"
    for value in values:
        try:
            turns = to_turns(value, shape, config.system_prompt, config.ignore_fields)
        except (ValueError, TypeError) as error:  # ingest quarantines it and says so
            problem = str(error)
            continue
        messages = [{"role": role, "content": text} for role, text, _ in turns]
        examples.append(encode(tokenizer, Row.model_validate({"messages": messages})))
    if not examples:
        raise ValueError(f"none of the first {len(values)} rows of {config.rows} can be used: {problem}")
    return examples


def _value(row: object) -> object:
    """The row's JSON value; None where it cannot be read, which ingest says when it runs."""
    try:
        return json.loads(row) if isinstance(row, bytes) else row
    except ValueError:
        return None


def check_lengths(config: PreflightConfig, examples: list[Example]) -> Iterator[Check]:
    """Whether the first rows fit `max_length`."""
    lengths = [len(example.input_ids) for example in examples]
    over = sum(length > config.max_length for length in lengths)
    result = f"{len(lengths)} rows, the longest {max(lengths)} tokens; max_length is {config.max_length}"
    if not over:
        yield Check("first rows", "ok", result)
        return
    fate = {"drop": "are left out", "cut": "are cut", "fail": "stop the run"}[config.over_long]
    stops = config.over_long == "fail" or (config.over_long == "drop" and over == len(lengths))
    state: State = "fail" if stops else "warn"
    yield Check("first rows", state, f"{result}: {over} are longer and {fate}", f"set max_length: {max(lengths)}")

"""A JSONL file of rows as tokenized examples."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadData
from tasks.core.rows import read_rows
from tasks.engine.data.chat_template import Example, encode, end_of_turn_id


def encode_file(
    tokenizer: PreTrainedTokenizerBase, path: Path, max_length: int, warn: Callable[[str], None]
) -> list[Example]:
    """The rows of a canonical JSONL file as ids. Rows over `max_length` tokens are left out, and `warn` names them.

    Raises BadData when no row is left, ValueError with the row's number for one that cannot be encoded.
    """
    end, examples, too_long = end_of_turn_id(tokenizer), list[Example](), list[str]()
    for number, row in enumerate(read_rows(path), start=1):
        try:
            example = encode(tokenizer, row, end)
        except ValueError as error:
            raise ValueError(f"{path.name} row {number}: {error}") from error
        if len(example.input_ids) > max_length:
            too_long.append(f"{number} ({len(example.input_ids)} tokens)")
        else:
            examples.append(example)
    if too_long:
        listed = ", ".join(too_long[:5]) + (" ..." if len(too_long) > 5 else "")
        warn(f"{path.name}: {len(too_long)} rows are longer than max_length={max_length} and left out: {listed}")
    if not examples:
        raise BadData(f"{path}: no row to train on: {len(too_long)} are longer than max_length={max_length}, raise it")
    return examples

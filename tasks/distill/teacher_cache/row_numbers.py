"""Row numbers of examples in their file, from which some rows were left out."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tasks.core.rows import read_rows
from tasks.engine.data.chat_template import Example, encode, end_of_turn_id


def row_numbers(path: Path, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[int]:
    """The number, from 1, of each example's row in the file that they were read from, in order."""
    with path.open("rb") as file:
        lines = sum(1 for _ in file)
    if lines == len(examples):
        return list(range(1, lines + 1))
    end, numbers, index = end_of_turn_id(tokenizer), list[int](), 0
    for number, row in enumerate(read_rows(path), start=1):  # rows that were too long are not among the examples
        if index < len(examples) and encode(tokenizer, row, end) == examples[index]:
            numbers.append(number)
            index += 1
    return numbers

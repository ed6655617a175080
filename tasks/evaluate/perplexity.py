"""Texts that a model's perplexity is measured on: the held-out rows' expected answers, and windows of general text."""

import math
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadData
from tasks.core.rows import Row
from tasks.engine.data.chat_template import IGNORE, encode, end_of_turn_id, prompt_ids
from tasks.engine.data.literal_tokens import encode_text
from tasks.evaluate.generation import Engine, Text

WINDOW = 256
"""Tokens of a window of general text."""


def expected_answers(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Text]:
    """Each row with its expected answer and end of turn; only those count in the loss."""
    end, texts = end_of_turn_id(tokenizer), []
    for row in rows:
        example = encode(tokenizer, row.up_to_answer(), end)
        start = next(i for i, label in enumerate(example.labels) if label != IGNORE)
        texts.append(Text(example.input_ids, start))
    return texts


def windows(tokenizer: PreTrainedTokenizerBase, directory: Path, tokens: int) -> list[Text]:
    """The first `tokens` tokens of a directory's text files, in windows that begin as a text of this model does.

    Raises BadData when there is no text.
    """
    files = sorted(path for path in directory.rglob("*.txt") if path.is_file())
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": "x"}])
    prefix = [token for token in prompt[:1] if token == tokenizer.bos_token_id]
    ids = encode_text(tokenizer, [text[: 16 * tokens]])[0][:tokens]
    if len(ids) < 2:
        raise BadData(f"{directory} holds no text (*.txt): give general text, or set text_tokens=0")
    texts = [Text([*prefix, *ids[start : start + WINDOW]], 1) for start in range(0, len(ids), WINDOW)]
    return [text for text in texts if len(text.input_ids) > 1]


def perplexity(engine: Engine, texts: Sequence[Text]) -> dict[str, float]:
    """exp(nats / tokens), the mean negative log-likelihood a token exponentiated, and over how many tokens."""
    loss = engine.loss(texts)
    return {"perplexity": math.exp(min(700.0, loss.nats / loss.tokens)), "tokens": float(loss.tokens)}

"""Metrics of free-text answers: token F1 and ROUGE-L."""

import re
import unicodedata
from collections import Counter

from tasks.core.metrics.metric import AnsweredRow, Metric, Visibility

UNSPACED = r"\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
"""Scripts that put no blanks between words: each character is a token, as in MLQA's and sacreBLEU's `zh` measures."""
WORD = rf"[[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]+"
TOKENS = rf"{WORD}|(?!\s)\X"
"""A word of letters, digits and marks, or else one character as people see it: of these scripts, a symbol, an emoji."""
NO_WORD = r"[\p{P}\x00-\x7f]\X*"
"""A token that is no word for ROUGE: punctuation and ASCII's symbols, as in Google's rouge-score. Emoji count."""


def tokens(text: str) -> list[str]:
    """Tokens of a text in composed form (NFC) and lower case, punctuation apart."""
    if text.isascii():
        return re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text.lower())
    import regex  # noqa: PLC0415  (flows import this module)

    return list(regex.findall(TOKENS, unicodedata.normalize("NFC", text).lower(), flags=regex.VERSION1))


def words(text: str) -> list[str]:
    """`tokens` without punctuation and ASCII's symbols."""
    import regex  # noqa: PLC0415

    no_word = regex.compile(NO_WORD)
    return [token for token in tokens(text) if token.isalnum() or not no_word.fullmatch(token)]


def token_f1(expected: str, answer: str) -> float:
    """F1 over tokens as bags, lower case, punctuation apart (SQuAD's measure, articles kept); 1 when both are empty.

    F1 = 2 |expected & answer| / (|expected| + |answer|)
    """
    expected_tokens, answer_tokens = Counter(tokens(expected)), Counter(tokens(answer))
    if not expected_tokens and not answer_tokens:
        return 1.0
    return 2 * (expected_tokens & answer_tokens).total() / (expected_tokens.total() + answer_tokens.total())


def rouge_l(expected: str, answer: str) -> float | None:
    """F1 of the longest common subsequence of words (ROUGE-L, Lin 2004), lower case, no stemming, punctuation left out.

    F1 = 2 LCS / (words expected + words answered); 1 when both texts are empty, None when none is expected.
    """
    from rapidfuzz.distance import LCSseq  # noqa: PLC0415  (flows import this module)

    expected_words, answer_words = words(expected), words(answer)
    if not expected_words:
        return None if tokens(expected + answer) else 1.0
    return float(2 * LCSseq.similarity(expected_words, answer_words) / (len(expected_words) + len(answer_words)))


def _token_f1(row: AnsweredRow) -> float | None:
    return token_f1(row.expected, row.answer) if row.expected_object is None else None


def _rouge_l(row: AnsweredRow) -> float | None:
    return rouge_l(row.expected, row.answer) if row.expected_object is None else None


METRICS = [
    Metric(
        name="token_f1",
        title="token F1",
        column=60,
        description="F1 over words of free text (SQuAD's)",
        observe=_token_f1,
        field="f1",
        aggregate="mean",
        paired=True,
        visibility=Visibility.TERMINAL,
    ),
    Metric(
        name="rouge_l",
        title="ROUGE-L",
        column=61,
        description="F1 of the longest common subsequence of words of free text",
        observe=_rouge_l,
        aggregate="mean",
        paired=True,
        visibility=Visibility.TERMINAL,
    ),
]

"""Metrics of free-text answers: token F1 and ROUGE-L."""

import re
from collections import Counter

from tasks.core.metrics.metric import AnsweredRow, Metric, Visibility


def token_f1(expected: str, answer: str) -> float:
    """F1 over words as bags, lower case, punctuation apart (SQuAD's measure, articles kept); 1 when both are empty.

    F1 = 2 |expected & answer| / (|expected| + |answer|)
    """
    expected_words, answer_words = (Counter(re.findall(r"\w+|[^\w\s]", text.lower())) for text in (expected, answer))
    if not expected_words and not answer_words:
        return 1.0
    return 2 * (expected_words & answer_words).total() / (expected_words.total() + answer_words.total())


def rouge_l(expected: str, answer: str) -> float:
    """F1 of the longest common subsequence of words (ROUGE-L, Lin 2004), lower case, no stemming, punctuation left out.

    F1 = 2 LCS / (words expected + words answered); 1 when neither has a word.
    """
    from rapidfuzz.distance import LCSseq  # noqa: PLC0415  (flows import this module)

    expected_words, answer_words = (re.findall(r"\w+", text.lower()) for text in (expected, answer))
    if not expected_words and not answer_words:
        return 1.0
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

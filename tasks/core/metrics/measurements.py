"""What an evaluation measures beside its scores: speeds, perplexities and size, with the titles of tables."""

from typing import NamedTuple


class Measurement(NamedTuple):
    """A fact of an evaluation that is no fraction, by its key in report.json. `compared`: by `flows.compare` too."""

    name: str
    title: str
    compared: bool = False


SPEEDS = (
    Measurement("first_token_ms", "first token, ms"),
    Measurement("latency_p50_ms", "answer p50, ms", compared=True),
    Measurement("latency_p90_ms", "answer p90, ms"),
    Measurement("latency_p99_ms", "answer p99, ms"),
    Measurement("alone_tokens_per_second", "tokens/s alone"),
    Measurement("tokens_per_second", "tokens/s batched", compared=True),
)
PERPLEXITIES = (
    Measurement("held_out_perplexity", "perplexity on expected answers", compared=True),
    Measurement("general_perplexity", "perplexity on general text", compared=True),
)
SIZE = Measurement("bytes", "bytes", compared=True)
COMPARED = [fact for fact in (SIZE, *SPEEDS, *PERPLEXITIES) if fact.compared]

"""All that is asked of one loaded model: its weights, all rows, some alone, some held to a schema, perplexity."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tasks.evaluate import EvaluateConfig
from tasks.evaluate.generation import Answered, Asked, Engine, Latency, Schema, Text, spread
from tasks.evaluate.perplexity import perplexity


class Measured(NamedTuple):
    """`constrained` and `free` are answers of the places in `held`, with and without the schema, asked alike.

    `perplexity` is by name of the texts, `statistics` are those of the weights.
    """

    answered: Answered
    alone: list[Latency]
    held: list[int]
    constrained: Answered | None
    free: Answered | None
    perplexity: dict[str, dict[str, float]]
    statistics: dict[str, Any]


def measure(
    engine: Engine, config: EvaluateConfig, asked: Asked, schema: Schema | None, texts: dict[str, Sequence[Text]]
) -> Measured:
    """Warm-up rows are answered once before anything is timed. `texts` are measured by name."""
    places = list(range(len(asked.prompts)))
    statistics = engine.parameters()
    if config.warmup_rows:
        engine.answer(places[: config.warmup_rows])
    answered = engine.answer(places)
    alone = [engine.alone(place) for place in spread(len(places), config.latency_rows)]
    held = spread(len(places), config.constrained_rows) if schema is not None else []
    if held and schema is not None:
        engine.answer(held[:1], schema)  # the grammar is compiled once
    constrained = engine.answer(held, schema) if held else None
    free = (answered if held == places else engine.answer(held)) if held else None
    found = {name: perplexity(engine, some) for name, some in texts.items() if some}
    return Measured(answered, alone, held, constrained, free, found, statistics)


def speeds(measured: Measured) -> dict[str, Any]:
    """Timings for the report: tokens a second over all rows, and of rows asked alone the quantiles in milliseconds."""
    answered = measured.answered
    found: dict[str, Any] = {"tokens_per_second": round(answered.generated / answered.seconds, 1)}
    if measured.alone:
        seconds = sum(one.total for one in measured.alone)
        found["alone_tokens_per_second"] = round(sum(one.tokens for one in measured.alone) / seconds, 1)
        found["first_token_ms"] = _quantile([one.first_token for one in measured.alone], 0.5)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            found[f"latency_{name}_ms"] = _quantile([one.total for one in measured.alone], share)
    for name, held in (("constrained", measured.constrained), ("free", measured.free)):
        if held is not None:
            found[f"{name}_tokens_per_second"] = round(held.generated / held.seconds, 1)
    return found


def _quantile(seconds: list[float], share: float) -> float:
    """The smallest time in milliseconds that `share` of the rows keep to."""
    ordered = sorted(seconds)
    place = min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))
    return round(1000 * ordered[place], 2)

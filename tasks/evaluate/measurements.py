"""Everything measured on one loaded model: weights, answers of all rows, latencies, constrained answers, perplexity."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tasks.evaluate import EvaluateConfig
from tasks.evaluate.generation import (
    Engine,
    Generation,
    GenerationRequest,
    Latency,
    Schema,
    Text,
    evenly_spaced,
)
from tasks.evaluate.perplexity import perplexity


class Measurements(NamedTuple):
    """Results of one model. `constrained` and `unconstrained` are answers of the prompts `constrained_indices`, with
    and without the schema; `perplexity` is by name of the texts, `statistics` are those of the weights.
    """

    generation: Generation
    latencies: list[Latency]
    constrained_indices: list[int]
    constrained: Generation | None
    unconstrained: Generation | None
    perplexity: dict[str, dict[str, float]]
    statistics: dict[str, Any]


def measure(
    engine: Engine,
    config: EvaluateConfig,
    request: GenerationRequest,
    schema: Schema | None,
    texts: dict[str, Sequence[Text]],
) -> Measurements:
    """Runs the model on everything. Warm-up rows are answered once before anything is timed."""
    indices = list(range(len(request.prompts)))
    statistics = engine.parameters()
    if config.warmup_rows:
        engine.generate(indices[: config.warmup_rows])
    generation = engine.generate(indices)
    latencies = [engine.time_single(index) for index in evenly_spaced(len(indices), config.latency_rows)]
    constrained_indices = evenly_spaced(len(indices), config.constrained_rows) if schema is not None else []
    constrained = unconstrained = None
    if constrained_indices:
        engine.generate(constrained_indices[:1], schema)  # the grammar is compiled once
        constrained = engine.generate(constrained_indices, schema)
        unconstrained = generation if constrained_indices == indices else engine.generate(constrained_indices)
    perplexities = {name: perplexity(engine, group) for name, group in texts.items() if group}
    return Measurements(
        generation, latencies, constrained_indices, constrained, unconstrained, perplexities, statistics
    )


def speeds(measurements: Measurements) -> dict[str, Any]:
    """Timings for the report: tokens a second over all rows, and of single rows the quantiles in milliseconds."""
    generation, latencies = measurements.generation, measurements.latencies
    timings: dict[str, Any] = {"tokens_per_second": _rate(generation)}
    if latencies:
        seconds = sum(latency.total for latency in latencies)
        timings["alone_tokens_per_second"] = round(sum(latency.tokens for latency in latencies) / seconds, 1)
        timings["first_token_ms"] = _quantile([latency.first_token for latency in latencies], 0.5)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            timings[f"latency_{name}_ms"] = _quantile([latency.total for latency in latencies], share)
    if measurements.constrained is not None and measurements.unconstrained is not None:
        timings["constrained_tokens_per_second"] = _rate(measurements.constrained)
        timings["free_tokens_per_second"] = _rate(measurements.unconstrained)
    return timings


def _rate(generation: Generation) -> float:
    return round(generation.tokens / generation.seconds, 1)


def _quantile(seconds: list[float], share: float) -> float:
    """The smallest time in milliseconds that `share` of the rows do not exceed."""
    ordered = sorted(seconds)
    index = min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))
    return round(1000 * ordered[index], 2)

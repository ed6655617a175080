"""A model's largest activations by tensor, compared with what float16 and float8 hold, and the rescale that fits them.

Every function takes the JSON summary of `tasks.outliers.forward_pass.summarize`.
"""

import math
from typing import Any

from tasks.engine.models.family import SANDWICH_NORMS

Numbers = dict[str, Any]
FLOAT16_MAX = 65504.0
FLOAT8_MAX = 448.0  # e4m3
EMBEDDING, STREAM = "the embedding", "the residual stream in layer"


def rescale_factor(activations: Numbers, margin: float) -> float | None:
    """The power of two that brings the residual stream `margin` times below float16's limit; None where it is there."""
    peak = max(activations["stream_peak"], max(post_norms(activations).values(), default=0.0))
    return 2.0 ** math.floor(math.log2(FLOAT16_MAX / (margin * peak))) if peak * margin > FLOAT16_MAX else None


def post_norms(activations: Numbers) -> dict[str, float]:
    """Peaks of the norms that write into the residual stream (Gemma 2 and 3), which a rescale scales as well."""
    sandwich = any(name.endswith("pre_feedforward_layernorm") for name in activations["norms"])
    return {name: peak for name, peak in activations["norms"].items() if sandwich and name.endswith(SANDWICH_NORMS)}


def peaks(activations: Numbers) -> dict[str, float]:
    """The largest magnitude of every tensor that a model in float16 holds in float16, by the tensor's name."""
    magnitudes = {EMBEDDING: activations["embedding"]["value"]}
    for layer in activations["layers"]:
        magnitudes[f"{STREAM} {layer['layer']}"] = max(layer["middle"]["value"], layer["output"]["value"])
    magnitudes |= activations["norms"]
    for name, linear in activations["linears"].items():
        magnitudes[name] = max(linear["input_peak"], linear["output_peak"])
    return magnitudes


def peak_outside_stream(activations: Numbers) -> float:
    """The largest activation that a rescale of the residual stream leaves as it is."""
    rescaled = {EMBEDDING, *post_norms(activations)}
    outside = (
        peak for name, peak in peaks(activations).items() if name not in rescaled and not name.startswith(STREAM)
    )
    return max(outside, default=0.0)

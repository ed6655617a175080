"""The largest activations of a model by place, against what float16 and float8 hold, and the rescale they need."""

import math
from typing import Any

Numbers = dict[str, Any]
FLOAT16_MAX = 65504.0
FLOAT8_MAX = 448.0  # e4m3


def rescale_needed(seen: Numbers, margin: float) -> float | None:
    """The power of two that brings the residual stream `margin` times below float16's limit; None if it is there."""
    peak = max(seen["stream_peak"], max(post_norms(seen).values(), default=0.0))
    return 2.0 ** math.floor(math.log2(FLOAT16_MAX / (margin * peak))) if peak * margin > FLOAT16_MAX else None


def post_norms(seen: Numbers) -> dict[str, float]:
    """What sandwich norms add to the stream: it is rescaled with the stream."""
    ends = ("post_attention_layernorm", "post_feedforward_layernorm")
    sandwich = any(name.endswith("pre_feedforward_layernorm") for name in seen["norms"])
    return {name: peak for name, peak in seen["norms"].items() if sandwich and name.endswith(ends)}


def peaks(seen: Numbers) -> dict[str, float]:
    """The largest magnitude of everything that a model in float16 would hold in float16, by place."""
    found = {"the embedding": seen["embedding"]["value"]}
    for layer in seen["layers"]:
        found[f"the residual stream in layer {layer['layer']}"] = max(
            layer["middle"]["value"], layer["output"]["value"]
        )
    found |= seen["norms"]
    for name, one in seen["linears"].items():
        found[name] = max(one["input_peak"], one["output_peak"])
    return found


def fixed(seen: Numbers) -> float:
    """The largest activation that no rescale touches."""
    scaled = {"the embedding", *post_norms(seen)}
    held = peaks(seen)
    return max((peak for place, peak in held.items() if place not in scaled and "residual" not in place), default=0.0)

"""Compares a model with its base: which tensors changed and whether outliers grew, as numbers and as sentences."""

from typing import Any

from tasks.core.refs import ModelDir
from tasks.engine.weights.effective import Weight, effective_weights
from tasks.engine.weights.safetensors_reader import stored_tensors
from tasks.outliers.peaks import FLOAT8_MAX, FLOAT16_MAX

Numbers = dict[str, Any]
AMPLIFIED = 1.1  # times the base's


def bases(models: dict[str, ModelDir]) -> dict[str, ModelDir]:
    """The base of each model that has one.

    An adapter's own, else the first model named earlier whose tensors it all has, in the same shapes (an untied copy
    has an LM head in addition).
    """
    base_of: dict[str, ModelDir] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, model in models.items():
        model_shapes = {tensor: stored.shape for tensor, stored in stored_tensors(model.base).items()}
        if model.adapter is not None:
            base_of[name] = ModelDir(model.base)
        else:
            twin = next((earlier for earlier in shapes if shapes[earlier].items() <= model_shapes.items()), None)
            if twin is not None:
                base_of[name] = models[twin]
        shapes[name] = model_shapes
    return base_of


def base_weights(base: ModelDir) -> dict[str, Weight]:
    """The base's weights by name; reads none of them."""
    return {weight.name: weight for weight in effective_weights(base)}


def change(weight: Weight, base: Weight) -> Numbers:
    """Largest absolute and relative root-mean-square difference from the base's tensor, NaN and infinity left out."""
    same_bytes = not weight.changed and not base.changed and weight.stored == base.stored
    if same_bytes:
        return {"changed": False, "max_change": 0.0, "relative_change": 0.0}
    largest = squares = energy = 0.0
    changed = False
    for chunk, base_chunk in zip(weight.chunks(), base.chunks(), strict=True):
        changed = changed or bool((chunk.isnan() != base_chunk.isnan()).any())
        difference = (chunk.double() - base_chunk.double()).nan_to_num_(0.0, 0.0, 0.0)
        largest = max(largest, float(difference.abs().max()))
        squares += float(difference.square().sum())
        energy += float(base_chunk.double().nan_to_num_(0.0, 0.0, 0.0).square().sum())
    relative = (squares / energy) ** 0.5 if energy else 0.0
    return {"changed": changed or largest > 0, "max_change": largest, "relative_change": relative}


def weight_sentences(name: str, tensors: list[Numbers], large_gain: float) -> list[str]:
    """What the weights of one model show, a sentence each, the worst first."""
    sentences = []
    for key, plural in (("nan", "NaN"), ("inf", "infinite values")):
        broken = [tensor for tensor in tensors if tensor[key]]
        if broken:
            worst = max(broken, key=lambda tensor: tensor[key])
            sentences.append(f"{name} has {plural} in {len(broken)} tensors ({worst['tensor']} first): do not use it")
    norms = [tensor for tensor in tensors if "gain" in tensor]
    if norms:
        sentences.append(_norm_sentence(name, norms, large_gain))
    if compared := [tensor for tensor in tensors if "changed" in tensor]:
        changed = sum(tensor["changed"] for tensor in compared)
        same = len(compared) - changed
        sentences.append(f"{name} changed {changed} of {len(tensors)} tensors and inherited {same} from its base")
    large = [tensor for tensor in tensors if tensor["float16_headroom"] and tensor["float16_headroom"] < 1]
    if large:
        sentences.append(f"{name} has weights beyond float16's 65504 ({large[0]['tensor']}): store it in bfloat16")
    blocked = [tensor for tensor in tensors if "q4_0" in tensor.get("error", {})]
    if blocked:
        worst = max(blocked, key=lambda tensor: tensor["error"]["q4_0"])
        sentences.append(
            f"{name} loses most to Q4_0 in {worst['tensor']}: {worst['error']['q4_0']:.1%} of its root mean square "
            f"(Q8_0: {worst['error']['q8_0']:.2%})"
        )
    return sentences


def growth(
    base: str,
    tensors: list[Numbers],
    base_tensors: list[Numbers],
    activations: Numbers | None,
    base_activations: Numbers | None,
) -> Numbers:
    """How the outliers of a model compare with its base's; `amplified` when one of the numbers grew by over a tenth.

    Compared are the largest gain, the largest weight and, where both models ran over rows, the residual stream's peak.
    """
    after, before = (
        {"largest_gain": largest_gain(numbers), "largest_weight": max(tensor["max"] for tensor in numbers)}
        for numbers in (tensors, base_tensors)
    )
    if activations and base_activations:
        after["stream_peak"], before["stream_peak"] = activations["stream_peak"], base_activations["stream_peak"]
    ratios = {name: value / before[name] if before[name] else 1.0 for name, value in after.items()}
    amplified = max(ratios.values()) > AMPLIFIED
    return {"base": base, "before": before, "now": after, "ratios": ratios, "amplified": amplified}


def growth_text(ratio: float) -> str:
    """A ratio as a change in percent, or as a factor from 2 on."""
    return f"{ratio - 1:+.1%}" if ratio < 2 else f"{ratio:.4g} times"


def growth_sentence(name: str, comparison: Numbers) -> str:
    """Whether training made outliers larger, with every number of `growth`."""
    titles = {"largest_gain": "largest norm gain", "largest_weight": "largest weight", "stream_peak": "residual stream"}
    before, after = comparison["before"], comparison["now"]
    numbers = ", ".join(
        f"{titles[key]} {before[key]:.4g} to {after[key]:.4g} ({growth_text(ratio)})"
        for key, ratio in comparison["ratios"].items()
    )
    verb = "amplified" if comparison["amplified"] else "did not amplify"
    return f"{name} {verb} the outliers of its base {comparison['base']}: {numbers}"


def stream_sentences(activations: dict[str, Numbers]) -> list[str]:
    """The peak of each model's residual stream, and whether float16 and float8 can hold it."""
    return [
        f"{name}'s residual stream reaches {(peak := summary['stream_peak']):.4g} on {summary['rows']} rows: "
        f"float16 {_room(FLOAT16_MAX / peak)}, float8 (e4m3) {_room(FLOAT8_MAX / peak)}"
        for name, summary in activations.items()
    ]


def largest_gain(tensors: list[Numbers]) -> float:
    """The largest gain of a model's norms; 0 without norms."""
    return max((tensor["gain"]["max"] for tensor in tensors if "gain" in tensor), default=0.0)


def _room(times: float) -> str:
    return f"has room for {times:.3g}x that" if times >= 1 else f"ends at {times:.2g} of it"


def _norm_sentence(name: str, norms: list[Numbers], large_gain: float) -> str:
    top = max(norms, key=lambda tensor: tensor["gain"]["max"])
    largest = top["gain"]["max"]
    start = f"{name}'s largest norm gain {largest:.1f} ({top['tensor']})"
    if "base_gain" not in top:
        sentence = start + " has no base here to be compared with"
    elif not top["changed"]:
        sentence = start + " is its base's (unchanged)"
    else:
        before = top["base_gain"]["max"]
        sentence = start + f" was {before:.1f} in its base ({largest / before - 1:+.1%})"
    if largest >= large_gain:
        sentence += "; norms are vectors that no weight-only format quantizes, but float16 activations can overflow"
    return sentence

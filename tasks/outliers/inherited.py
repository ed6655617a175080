"""What a model changed and what it inherited: tensor by tensor against its base, and in sentences."""

from typing import Any

from tasks.core.refs import ModelDir
from tasks.engine.stored import stored_tensors
from tasks.engine.weights import Weight, weights


def bases(models: dict[str, ModelDir]) -> dict[str, ModelDir]:
    """Each model's base: an adapter's own, else the first model named before it with the same tensors and shapes."""
    found: dict[str, ModelDir] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, model in models.items():
        mine = {tensor: stored.shape for tensor, stored in stored_tensors(model.base).items()}
        if model.adapter is not None:
            found[name] = ModelDir(model.base)
        else:
            twin = next((earlier for earlier, theirs in shapes.items() if theirs == mine), None)
            if twin is not None:
                found[name] = models[twin]
        shapes[name] = mine
    return found


def base_weights(base: ModelDir) -> dict[str, Weight]:
    """The base's weights by name; nothing is read yet."""
    return {weight.name: weight for weight in weights(base)}


def change(weight: Weight, base: Weight) -> dict[str, Any]:
    """Largest absolute and relative root-mean-square difference from the base's tensor, NaN and infinity left out."""
    same_bytes = not weight.changed and not base.changed and weight.stored == base.stored
    if same_bytes:
        return {"changed": False, "max_change": 0.0, "relative_change": 0.0}
    largest = squares = energy = 0.0
    changed = False
    for mine, theirs in zip(weight.chunks(), base.chunks(), strict=True):
        changed = changed or bool((mine.isnan() != theirs.isnan()).any())
        difference = (mine.double() - theirs.double()).nan_to_num_(0.0, 0.0, 0.0)
        largest = max(largest, float(difference.abs().max()))
        squares += float(difference.square().sum())
        energy += float(theirs.double().nan_to_num_(0.0, 0.0, 0.0).square().sum())
    relative = (squares / energy) ** 0.5 if energy else 0.0
    return {"changed": changed or largest > 0, "max_change": largest, "relative_change": relative}


def sentences(name: str, tensors: list[dict[str, Any]], large_gain: float) -> list[str]:
    """What a person should know of one model, worst first; every sentence from the numbers in `tensors`."""
    told = []
    for problem, what in (("nan", "NaN"), ("inf", "infinite values")):
        bad = [tensor for tensor in tensors if tensor[problem]]
        if bad:
            worst = max(bad, key=lambda tensor: tensor[problem])
            told.append(f"{name} has {what} in {len(bad)} tensors ({worst['tensor']} first): do not use it")
    norms = [tensor for tensor in tensors if "gain" in tensor]
    if norms:
        told.append(_about_norms(name, norms, large_gain))
    if any("changed" in tensor for tensor in tensors):
        changed = [tensor for tensor in tensors if tensor.get("changed")]
        same = len(tensors) - len(changed)
        told.append(f"{name} changed {len(changed)} of {len(tensors)} tensors and inherited {same} from its base")
    large = [tensor for tensor in tensors if tensor["float16_headroom"] and tensor["float16_headroom"] < 1]
    if large:
        told.append(f"{name} has weights beyond float16's 65504 ({large[0]['tensor']}): store it in bfloat16")
    blocked = [tensor for tensor in tensors if "q4_0" in tensor.get("error", {})]
    if blocked:
        worst = max(blocked, key=lambda tensor: tensor["error"]["q4_0"])
        told.append(
            f"{name} loses most to Q4_0 in {worst['tensor']}: {worst['error']['q4_0']:.1%} of its root mean square "
            f"(Q8_0: {worst['error']['q8_0']:.2%})"
        )
    return told


def stream_sentences(origins: dict[str, str], observed: dict[str, dict[str, Any]]) -> list[str]:
    """How far each model's residual stream reaches, beside its base's on the same rows; `origins` are names."""
    told = []
    for name, seen in observed.items():
        told.append(f"{name}'s residual stream reaches {seen['stream_peak']:.4g} on {seen['rows']} rows")
        if origins.get(name) in observed:
            before = observed[origins[name]]["stream_peak"]
            told[-1] += f", its base's {before:.4g} ({seen['stream_peak'] / before - 1:+.1%})"
    return told


def _about_norms(name: str, norms: list[dict[str, Any]], large_gain: float) -> str:
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

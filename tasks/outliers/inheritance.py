"""What a model changed and what it inherited: tensor by tensor against its base, and in sentences."""

from typing import Any

from tasks.core.refs import ModelDir
from tasks.engine.weights.effective import Weight, weights
from tasks.engine.weights.safetensors_reader import stored_tensors
from tasks.outliers.peaks import FLOAT8_MAX, FLOAT16_MAX

Numbers = dict[str, Any]
AMPLIFIED = 1.1  # times the base's


def bases(models: dict[str, ModelDir]) -> dict[str, ModelDir]:
    """Each model's base: an adapter's own, else the first model named before it all of whose tensors it has, in
    their shapes (an untied copy has a head besides)."""
    found: dict[str, ModelDir] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, model in models.items():
        mine = {tensor: stored.shape for tensor, stored in stored_tensors(model.base).items()}
        if model.adapter is not None:
            found[name] = ModelDir(model.base)
        else:
            twin = next((earlier for earlier, theirs in shapes.items() if theirs.items() <= mine.items()), None)
            if twin is not None:
                found[name] = models[twin]
        shapes[name] = mine
    return found


def base_weights(base: ModelDir) -> dict[str, Weight]:
    """The base's weights by name; nothing is read yet."""
    return {weight.name: weight for weight in weights(base)}


def change(weight: Weight, base: Weight) -> Numbers:
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


def sentences(name: str, tensors: list[Numbers], large_gain: float) -> list[str]:
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
    if compared := [tensor for tensor in tensors if "changed" in tensor]:
        changed = sum(tensor["changed"] for tensor in compared)
        same = len(compared) - changed
        told.append(f"{name} changed {changed} of {len(tensors)} tensors and inherited {same} from its base")
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


def growth(
    base: str, tensors: list[Numbers], theirs: list[Numbers], seen: Numbers | None, before: Numbers | None
) -> Numbers:
    """How the outliers of a model compare with its base's: largest gain, largest weight, and the stream's peak where
    both ran over rows. `amplified` when one of them grew by more than a tenth."""
    now, then = (
        {"largest_gain": _largest_gain(one), "largest_weight": max(tensor["max"] for tensor in one)}
        for one in (tensors, theirs)
    )
    if seen and before:
        now["stream_peak"], then["stream_peak"] = seen["stream_peak"], before["stream_peak"]
    ratios = {what: value / then[what] if then[what] else 1.0 for what, value in now.items()}
    return {"base": base, "before": then, "now": now, "ratios": ratios, "amplified": max(ratios.values()) > AMPLIFIED}


def grew(ratio: float) -> str:
    """In percent, or as a factor from twice the size on."""
    return f"{ratio - 1:+.1%}" if ratio < 2 else f"{ratio:.4g} times"


def growth_sentence(name: str, grown: Numbers) -> str:
    """Whether training made outliers larger, with every number."""
    what = {"largest_gain": "largest norm gain", "largest_weight": "largest weight", "stream_peak": "residual stream"}
    numbers = ", ".join(
        f"{what[key]} {grown['before'][key]:.4g} to {grown['now'][key]:.4g} ({grew(ratio)})"
        for key, ratio in grown["ratios"].items()
    )
    did = "amplified" if grown["amplified"] else "did not amplify"
    return f"{name} {did} the outliers of its base {grown['base']}: {numbers}"


def stream_sentences(observed: dict[str, Numbers]) -> list[str]:
    """How far each model's residual stream reaches, and whether small floats can hold it."""
    return [
        f"{name}'s residual stream reaches {(peak := seen['stream_peak']):.4g} on {seen['rows']} rows: "
        f"float16 {_room(FLOAT16_MAX / peak)}, float8 (e4m3) {_room(FLOAT8_MAX / peak)}"
        for name, seen in observed.items()
    ]


def _room(times: float) -> str:
    return f"has room for {times:.3g}x that" if times >= 1 else f"ends at {times:.2g} of it"


def _largest_gain(tensors: list[Numbers]) -> float:
    return max((one["gain"]["max"] for one in tensors if "gain" in one), default=0.0)


def _about_norms(name: str, norms: list[Numbers], large_gain: float) -> str:
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

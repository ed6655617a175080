"""The verdict: for each way to deploy a model, whether it is safe, because of which measured numbers, and what to do.

`judge` is plain arithmetic on what was measured elsewhere. Words: safe; risky (right with the remedy or condition
that is named, or within `margin` of a limit); unsafe; unknown (it depends on what was not looked at).
"""

import math
from typing import Any

from tasks.outliers.peaks import FLOAT16_MAX, fixed, peaks, rescale_needed

Numbers = dict[str, Any]
Q8_INPUT_MAX = 127 * FLOAT16_MAX  # ggml keeps the scale of a block of 8-bit activations in float16
TARGETS = ("bf16", "fp16", "gguf_cpu", "gguf_fp16", "gptq", "awq", "int8_activations")
GOOD, BEARABLE = (0.05, 0.95), (0.5, 0.8)  # (mean KL, top-1) of a simulation that is safe, and of one that is risky
LOST_GAIN = 0.01  # relative error of a norm's gains in another dtype from which on it is named
UNSEEN = "activations were not seen: give a dataset to know"
CACHE = ("v_proj", "k_proj", "k_norm")  # llama.cpp keeps keys and values in float16 unless told otherwise


def judge(tensors: list[Numbers], seen: Numbers | None, outcomes: dict[str, Numbers], margin: float) -> Numbers:
    """Verdicts by target for one model; `seen` is `summary` of its activations, None without a dataset."""
    bad = [tensor for tensor in tensors if tensor["nan"] or tensor["inf"]]
    if bad:
        because = [f"{one['tensor']} has {one['nan']} NaN and {one['inf']} infinite values" for one in bad[:3]]
        return {name: _say("unsafe", because, ["do not use this checkpoint"]) for name in TARGETS}
    fp16 = _fp16(tensors, seen, outcomes, margin)
    return {
        "bf16": _bf16(tensors, seen, outcomes),
        "fp16": fp16,
        "gguf_cpu": _gguf_cpu(tensors, seen),
        "gguf_fp16": _gguf_fp16(seen, margin),
        "gptq": _gptq(fp16, tensors),
        "awq": _awq(fp16, tensors, outcomes),
        "int8_activations": _int8(seen, outcomes),
    }


def _say(verdict: str, because: list[str], do: list[str], **more: Any) -> Numbers:
    return {"verdict": verdict, "because": because, "do": do, **more}


def _bf16(tensors: list[Numbers], seen: Numbers | None, outcomes: dict[str, Numbers]) -> Numbers:
    lost = _lost_gains(tensors, "bfloat16")
    if lost:
        keep = "keep the norms in float32: in bfloat16 a gain that is stored as gain - 1 near -1 is rounded away"
        return _say("unsafe" if lost[0][1] > 0.1 else "risky", [_lost(*lost[0], "bfloat16")], [keep])
    because = ["its range reaches 3e38, and every weight is finite"]
    if seen is None:
        return _say("safe", [*because, UNSEEN], [])
    if seen["not_finite"]:
        return _say("unsafe", [f"{seen['not_finite']} linear layers gave NaN or infinite values"], ["do not use it"])
    because.append(f"the largest activation is {max(peaks(seen).values()):.3g}")
    return _measured(_say("safe", because, []), outcomes.get("bfloat16"))


def _fp16(tensors: list[Numbers], seen: Numbers | None, outcomes: dict[str, Numbers], margin: float) -> Numbers:
    large = [tensor for tensor in tensors if tensor["max"] > FLOAT16_MAX]
    if large:
        return _say("unsafe", [f"{one['tensor']} holds {one['max']:.4g}, float16 ends at 65504" for one in large[:3]], [
            "store it in bfloat16 or float32"
        ])  # fmt: skip
    if seen is None:
        return _say("unknown", ["every weight fits into float16", UNSEEN], [])
    held = peaks(seen)
    beyond = {place: peak for place, peak in held.items() if peak > FLOAT16_MAX / margin}
    if not beyond:
        lost = _lost_gains(tensors, "float16")
        because = [f"the largest activation is {max(held.values()):.4g}: {FLOAT16_MAX / max(held.values()):.1f}x room"]
        word = "risky" if lost else "safe"
        return _measured(
            _say(word, because + [_lost(*one, "float16") for one in lost[:1]], []), outcomes.get("float16")
        )
    worst = sorted(beyond.items(), key=lambda item: -item[1])
    over = any(peak > FLOAT16_MAX for peak in beyond.values())
    because = [f"{place} reaches {peak:.4g} on your rows, float16 ends at 65504" for place, peak in worst[:4]]
    do = ["run it in bfloat16 or float32"]
    k = rescale_needed(seen, margin)
    if k is not None and fixed(seen) <= FLOAT16_MAX:
        do.append(
            f"or rescale the residual stream by k = 2^{int(math.log2(k))} = {k:g} (same function, "
            "tasks.engine.weights.rescale)"
        )
    said = _say("unsafe" if over else "risky", because, do, k=k, layers=[place for place, _ in worst])
    return _measured(said, outcomes.get("float16"))


def _gguf_cpu(tensors: list[Numbers], seen: Numbers | None) -> Numbers:
    because = ["norms are vectors: llama.cpp keeps them in float32 whatever the file's type"]
    worst = max((one for one in tensors if "error" in one), key=lambda one: one["error"].get("q4_0", 0.0), default=None)
    if worst and "q4_0" in worst["error"]:
        error = worst["error"]
        because.append(f"Q4_0 costs most in {worst['tensor']}: {error['q4_0']:.1%}, Q8_0 there {error['q8_0']:.2%}")
    if seen is None:
        return _say("safe", [*because, f"activations stay in float32 between operations; {UNSEEN}"], [])
    inputs = max(one["input_peak"] for one in seen["linears"].values())
    cache = [
        *((one["output_peak"], name) for name, one in seen["linears"].items() if name.endswith(CACHE)),
        *((peak, name) for name, peak in seen["norms"].items() if name.endswith(CACHE)),
    ]
    peak, name = max(cache, default=(0.0, ""))
    because.append(f"the stream's peak of {seen['stream_peak']:.4g} is kept in float32")
    if inputs > Q8_INPUT_MAX:
        return _say("unsafe", [*because, f"a linear layer's input reaches {inputs:.3g}, 8-bit blocks end at 8.3e6"], [])
    if peak > FLOAT16_MAX:
        told = f"{name} reaches {peak:.4g}, and llama.cpp's cache holds float16"
        return _say("risky", [*because, told], ["set --cache-type-k and --cache-type-v to bf16 or f32"])
    if inputs > FLOAT16_MAX:
        told = f"a linear layer's input reaches {inputs:.4g}: with an F16 file it is cast to float16"
        return _say("risky", [*because, told], ["deliver BF16 or a quantized type, not F16"])
    return _say("safe", because, [])


def _gguf_fp16(seen: Numbers | None, margin: float) -> Numbers:
    if seen is None:
        return _say("unknown", [UNSEEN], [])
    matmul = {
        name: max(one["input_peak"], one["output_peak"])
        for name, one in seen["linears"].items()
        if max(one["input_peak"], one["output_peak"]) * margin > FLOAT16_MAX
    }
    k = rescale_needed(seen, margin)
    do = [f"rescale the residual stream by k = {k:g} before the conversion"] if k is not None else []
    if matmul:
        name, peak = max(matmul.items(), key=lambda item: item[1])
        said = [f"{name} reaches {peak:.4g} in its matrix product, float16 ends at 65504"]
        return _say(
            "unsafe" if peak > FLOAT16_MAX else "risky", said, ["use a backend that multiplies in float32", *do]
        )
    if k is not None:
        said = [f"the stream reaches {seen['stream_peak']:.4g}: a backend that adds in float16, too, overflows"]
        return _say("risky", [*said, "one that only multiplies in float16 does not"], do, k=k)
    return _say("safe", ["matrix products and the stream stay below 65504 on your rows"], [])


def _gptq(fp16: Numbers, tensors: list[Numbers]) -> Numbers:
    because = ["it quantizes matrices; norms are vectors and stay as they are"]
    if fp16["verdict"] == "safe":
        return _say("safe", [*because, "activations fit into float16"], [])
    if fp16["verdict"] == "unknown":
        because.append(UNSEEN)
    condition = ["load, calibrate and serve in bfloat16: in float16 the calibration sees infinite values"]
    word = "unknown" if fp16["verdict"] == "unknown" else "risky"
    return _say(word, [*because, f"float16 is {fp16['verdict']} for this model"], condition)


def _awq(fp16: Numbers, tensors: list[Numbers], outcomes: dict[str, Numbers]) -> Numbers:
    said = _gptq(fp16, tensors)
    if not any(tensor.get("adds_one") for tensor in tensors):
        return said
    because = [*said["because"], "its norms multiply by 1 + w, and AWQ divides a norm by its scales"]
    right, naive = outcomes.get("awq fold (1+w)/s-1"), outcomes.get("awq fold w/s")
    if right and naive:
        numbers = f"mean KL {naive['mean_kl']:.2g} when w is divided, {right['mean_kl']:.2g} when 1 + w is"
        because.append(f"before any rounding of weights: {numbers}")
    fold = "use a tool that folds w' = (1 + w)/s - 1 (llm-compressor since its pull request 2500)"
    return _say("unknown" if said["verdict"] == "unknown" else "risky", because, [fold, *said["do"]])


def _int8(seen: Numbers | None, outcomes: dict[str, Numbers]) -> Numbers:
    if seen is None:
        return _say("unknown", [UNSEEN], [])
    worst = sorted(seen["linears"].items(), key=lambda item: -item[1]["lost_channels"])[:3]
    because = [
        f"{name}: one scale for its input (peak {one['input_peak']:.3g}, median channel {one['median_rms']:.2g}) "
        f"rounds {one['lost_channels']:.0%} of the channels to zero"
        for name, one in worst
        if one["lost_channels"] > 0
    ]
    static = outcomes.get("int8 activations, scale a tensor")
    token = outcomes.get("int8 activations, scale a token")
    if static is None or token is None:
        word = "risky" if worst and worst[0][1]["lost_channels"] > 0.25 else "unknown"
        return _say(word, because, ["simulate it: set measure to focus or all"])
    words = [_word(static), _word(token)]
    because += [
        f"simulated, one scale a tensor from calibration: mean KL {static['mean_kl']:.2g}, top-1 {static['top1']:.1%}",
        f"simulated, one scale a token: mean KL {token['mean_kl']:.2g}, top-1 {token['top1']:.1%}",
    ]
    if words == ["safe", "safe"]:
        return _say("safe", because, [])
    if words[1] == "safe":
        return _say("risky", because, ["quantize activations with a scale for each token, or leave them in 16 bits"])
    return _say(max(words, key=("safe", "risky", "unsafe").index), because, ["quantize weights only"])


def _lost_gains(tensors: list[Numbers], dtype: str) -> list[tuple[str, float]]:
    found = [(one["tensor"], one["rounding"][dtype]) for one in tensors if "rounding" in one]
    return sorted((pair for pair in found if pair[1] > LOST_GAIN), key=lambda pair: -pair[1])


def _lost(tensor: str, error: float, dtype: str) -> str:
    return f"{tensor} loses {error:.1%} of its gains in {dtype}"


def _measured(said: Numbers, outcome: Numbers | None) -> Numbers:
    """The verdict beside what was tried; what happened goes before what was predicted."""
    if outcome is None:
        return said
    tried = f"tried: mean KL {outcome['mean_kl']:.2g}, top-1 {outcome['top1']:.1%}, {outcome['not_finite']:.0f} of "
    tried += f"{outcome['tokens']:.0f} tokens not finite"
    worse = max(said["verdict"], _word(outcome), key=("safe", "risky", "unsafe").index)
    return {**said, "verdict": worse, "predicted": said["verdict"], "because": [*said["because"], tried]}


def _word(outcome: Numbers) -> str:
    if outcome["not_finite"]:
        return "unsafe"
    for word, (kl, top1) in (("safe", GOOD), ("risky", BEARABLE)):
        if outcome["mean_kl"] <= kl and outcome["top1"] >= top1:
            return word
    return "unsafe"

"""One rule a deployment target, from the numbers of a model's weights, activations and trials."""

import math

from tasks.core.audit_words import agreement_verdict, worst
from tasks.outliers.peaks import FLOAT16_MAX, peak_outside_stream, peaks, rescale_factor
from tasks.outliers.targets import (
    AWQ_FOLD,
    NAIVE_AWQ_FOLD,
    NOT_MEASURED,
    STATIC_INT8,
    TARGETS,
    TOKEN_INT8,
    Assessment,
    Evidence,
    Numbers,
    target,
)

Q8_INPUT_MAX = 127 * FLOAT16_MAX  # ggml stores the scale of a block of 8-bit activations in float16
ROUNDED_GAIN = 0.01  # relative error of a norm's gains in another dtype from which on it is named
FLOAT32_NORMS = "keep the norms in float32: in bfloat16 a gain that is stored as gain - 1 near -1 is rounded away"
IN_BFLOAT16 = "load, calibrate and serve in bfloat16: in float16 the calibration sees infinite values"
CACHED = ("v_proj", "k_proj", "k_norm")  # llama.cpp's KV cache is float16 by default


def assess(evidence: Evidence) -> dict[str, Numbers]:
    """Entries of `verdict.json` for one model, by target."""
    return {name: {"title": rule.title, **rule.check(evidence).as_json()} for name, rule in TARGETS.items()}


@target("bf16", "bfloat16", FLOAT32_NORMS)
def _bf16(evidence: Evidence, remedy: str) -> Assessment:
    activations = evidence.activations
    rounded = _rounded_gains(evidence.tensors, "bfloat16")
    if rounded:
        verdict = "unsafe" if rounded[0][1] > 0.1 else "risky"
        return Assessment(verdict, [_rounding_sentence(*rounded[0], "bfloat16")], [remedy])
    reasons = ["its range reaches 3e38, and every weight is finite"]
    if activations is None:
        return Assessment("safe", [*reasons, NOT_MEASURED])
    if activations["not_finite"]:
        broken = f"{activations['not_finite']} linear layers gave NaN or infinite values"
        return Assessment("unsafe", [broken], ["do not use it"])
    reasons.append(f"the largest activation is {max(peaks(activations).values()):.3g}")
    return Assessment("safe", reasons).with_trial(evidence.trials.get("bfloat16"))


@target("fp16", "float16", "run it in bfloat16 or float32")
def _fp16(evidence: Evidence, remedy: str) -> Assessment:
    activations, margin = evidence.activations, evidence.margin
    large = [tensor for tensor in evidence.tensors if tensor["max"] > FLOAT16_MAX]
    if large:
        reasons = [f"{tensor['tensor']} holds {tensor['max']:.4g}, float16 ends at 65504" for tensor in large[:3]]
        return Assessment("unsafe", reasons, ["store it in bfloat16 or float32"])
    if activations is None:
        return Assessment("unknown", ["every weight fits into float16", NOT_MEASURED])
    magnitudes = peaks(activations)
    beyond = sorted(
        ((name, peak) for name, peak in magnitudes.items() if peak > FLOAT16_MAX / margin), key=lambda pair: -pair[1]
    )
    trial = evidence.trials.get("float16")
    if not beyond:
        largest = max(magnitudes.values())
        rounded = _rounded_gains(evidence.tensors, "float16")
        reasons = [f"the largest activation is {largest:.4g}: {FLOAT16_MAX / largest:.1f}x room"]
        reasons += [_rounding_sentence(*gain, "float16") for gain in rounded[:1]]
        return Assessment("risky" if rounded else "safe", reasons).with_trial(trial)
    reasons = [f"{name} reaches {peak:.4g} on your rows, float16 ends at 65504" for name, peak in beyond[:4]]
    do = [remedy]
    k = rescale_factor(activations, margin)
    if k is not None and peak_outside_stream(activations) <= FLOAT16_MAX:
        do.append(
            f"or rescale the residual stream by k = 2^{int(math.log2(k))} = {k:g} (same function, "
            "tasks.engine.weights.rescale)"
        )
    verdict = "unsafe" if beyond[0][1] > FLOAT16_MAX else "risky"
    return Assessment(verdict, reasons, do, {"k": k, "layers": [name for name, _ in beyond]}).with_trial(trial)


@target("gguf_cpu", "llama.cpp on a CPU", "set --cache-type-k and --cache-type-v to bf16 or f32")
def _gguf_cpu(evidence: Evidence, remedy: str) -> Assessment:
    activations = evidence.activations
    reasons = ["norms are vectors: llama.cpp keeps them in float32 whatever the file's type"]
    matrices = [tensor for tensor in evidence.tensors if "error" in tensor]
    matrix = max(matrices, key=lambda tensor: tensor["error"].get("q4_0", 0.0), default=None)
    if matrix and "q4_0" in matrix["error"]:
        error = matrix["error"]
        reasons.append(f"Q4_0 costs most in {matrix['tensor']}: {error['q4_0']:.1%}, Q8_0 there {error['q8_0']:.2%}")
    if activations is None:
        return Assessment("safe", [*reasons, f"activations stay in float32 between operations; {NOT_MEASURED}"])
    largest_input = max(linear["input_peak"] for linear in activations["linears"].values())
    cached = [
        *((linear["output_peak"], name) for name, linear in activations["linears"].items() if name.endswith(CACHED)),
        *((peak, name) for name, peak in activations["norms"].items() if name.endswith(CACHED)),
    ]
    cache_peak, name = max(cached, default=(0.0, ""))
    reasons.append(f"the stream's peak of {activations['stream_peak']:.4g} is kept in float32")
    if largest_input > Q8_INPUT_MAX:
        reasons.append(f"a linear layer's input reaches {largest_input:.3g}, 8-bit blocks end at 8.3e6")
        return Assessment("unsafe", reasons)
    if cache_peak > FLOAT16_MAX:
        reasons.append(f"{name} reaches {cache_peak:.4g}, and llama.cpp's cache holds float16")
        return Assessment("risky", reasons, [remedy])
    if largest_input > FLOAT16_MAX:
        reasons.append(f"a linear layer's input reaches {largest_input:.4g}: with an F16 file it is cast to float16")
        return Assessment("risky", reasons, ["deliver BF16 or a quantized type, not F16"])
    return Assessment("safe", reasons)


@target("gguf_fp16", "llama.cpp on a backend that multiplies in float16", "use a backend that multiplies in float32")
def _gguf_fp16(evidence: Evidence, remedy: str) -> Assessment:
    activations, margin = evidence.activations, evidence.margin
    if activations is None:
        return Assessment("unknown", [NOT_MEASURED])
    products = {
        name: max(linear["input_peak"], linear["output_peak"]) for name, linear in activations["linears"].items()
    }
    name, peak = max(products.items(), key=lambda pair: pair[1])
    k = rescale_factor(activations, margin)
    rescale = [f"rescale the residual stream by k = {k:g} before the conversion"] if k is not None else []
    if peak * margin > FLOAT16_MAX:
        reasons = [f"{name} reaches {peak:.4g} in its matrix product, float16 ends at 65504"]
        return Assessment("unsafe" if peak > FLOAT16_MAX else "risky", reasons, [remedy, *rescale])
    if k is not None:
        stream = f"the stream reaches {activations['stream_peak']:.4g}: a backend that adds in float16, too, overflows"
        return Assessment("risky", [stream, "one that only multiplies in float16 does not"], rescale, {"k": k})
    return Assessment("safe", ["matrix products and the stream stay below 65504 on your rows"])


@target("gptq", "GPTQ", IN_BFLOAT16)
def _gptq(evidence: Evidence, remedy: str) -> Assessment:
    reasons = ["it quantizes matrices; norms are vectors and stay as they are"]
    fp16 = _fp16(evidence, "").verdict
    if fp16 == "safe":
        return Assessment("safe", [*reasons, "activations fit into float16"])
    if fp16 == "unknown":
        reasons.append(NOT_MEASURED)
    reasons.append(f"float16 is {fp16} for this model")
    return Assessment("unknown" if fp16 == "unknown" else "risky", reasons, [remedy])


@target("awq", "AWQ", "use a tool that folds w' = (1 + w)/s - 1 (llm-compressor since its pull request 2500)")
def _awq(evidence: Evidence, remedy: str) -> Assessment:
    plain = _gptq(evidence, IN_BFLOAT16)
    if not any(tensor.get("adds_one") for tensor in evidence.tensors):
        return plain
    reasons = [*plain.reasons, "its norms multiply by 1 + w, and AWQ divides a norm by its scales"]
    fold, naive_fold = evidence.trials.get(AWQ_FOLD), evidence.trials.get(NAIVE_AWQ_FOLD)
    if fold and naive_fold:
        numbers = f"mean KL {naive_fold['mean_kl']:.2g} when w is divided, {fold['mean_kl']:.2g} when 1 + w is"
        reasons.append(f"before any rounding of weights: {numbers}")
    return Assessment(worst([plain.verdict, "risky"]), reasons, [remedy, *plain.do])


@target("int8_activations", "8-bit activations", "quantize weights only")
def _int8_activations(evidence: Evidence, remedy: str) -> Assessment:
    if evidence.activations is None:
        return Assessment("unknown", [NOT_MEASURED])
    linears = sorted(evidence.activations["linears"].items(), key=lambda pair: -pair[1]["lost_channels"])[:3]
    reasons = [
        f"{name}: one scale for its input (peak {linear['input_peak']:.3g}, median channel {linear['median_rms']:.2g}) "
        f"rounds {linear['lost_channels']:.0%} of the channels to zero"
        for name, linear in linears
        if linear["lost_channels"] > 0
    ]
    static, token = evidence.trials.get(STATIC_INT8), evidence.trials.get(TOKEN_INT8)
    if static is None or token is None:
        verdict = "risky" if linears and linears[0][1]["lost_channels"] > 0.25 else "unknown"
        return Assessment(verdict, reasons, ["simulate it: set measure to focus or all"])
    reasons += [
        f"simulated, one scale a tensor from calibration: mean KL {static['mean_kl']:.2g}, top-1 {static['top1']:.1%}",
        f"simulated, one scale a token: mean KL {token['mean_kl']:.2g}, top-1 {token['top1']:.1%}",
    ]
    static_verdict, token_verdict = agreement_verdict(static), agreement_verdict(token)
    if static_verdict == token_verdict == "safe":
        return Assessment("safe", reasons)
    if token_verdict == "safe":
        scale = "quantize activations with a scale for each token, or leave them in 16 bits"
        return Assessment("risky", reasons, [scale])
    return Assessment(worst([static_verdict, token_verdict]), reasons, [remedy])


def _rounded_gains(tensors: list[Numbers], dtype: str) -> list[tuple[str, float]]:
    """Norms whose gains lose more than `ROUNDED_GAIN` in `dtype`, worst first: name and relative error."""
    losses = [(tensor["tensor"], tensor["rounding"][dtype]) for tensor in tensors if "rounding" in tensor]
    return sorted((loss for loss in losses if loss[1] > ROUNDED_GAIN), key=lambda loss: -loss[1])


def _rounding_sentence(tensor: str, error: float, dtype: str) -> str:
    return f"{tensor} loses {error:.1%} of its gains in {dtype}"

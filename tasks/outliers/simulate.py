"""What a target does to the model, tried on held-out answers: other dtypes, remedies, int8 activations, AWQ's fold.

Everything is compared with the model in float32 (`tasks.engine.compare.changed_model` says how).
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.core.job import Job
from tasks.engine.compare.agreement import answer_logits
from tasks.engine.compare.changed_model import trial
from tasks.engine.data.chat_template import Example
from tasks.engine.models.norms import adds_one, is_norm
from tasks.engine.weights.rescale import changes
from tasks.outliers.layer_statistics import Activations

Outcome = dict[str, float]
# Norms and the linear layers that read them: what AWQ scales together. Gemma 2 and 3, then pre-norm blocks.
FOLDS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
FOLD_STRENGTH = 0.5  # AWQ searches 0 to 1 (arXiv 2306.00978); the middle is enough to see whether a fold is right


def simulate(
    model: PreTrainedModel, examples: list[Example], seen: Activations, base: Path, k: float | None,
    percentile: float, job: Job,
) -> dict[str, Outcome]:  # fmt: skip
    """Outcomes by name for a model in float32; `k` is the rescale to try, None where there is nothing to rescale."""
    plans: dict[str, Callable[[PreTrainedModel], object]] = {
        "float32": lambda other: other,
        "bfloat16": lambda other: cast_to(other, torch.bfloat16),
        "float16": lambda other: cast_to(other, torch.float16),
        "clipped float32": lambda other: clip(other, base, percentile),
        "int8 activations, scale a tensor": lambda other: int8_inputs(other, seen),
        "int8 activations, scale a token": lambda other: int8_inputs(other, None),
    }
    if k is not None:
        plans["rescaled float32"] = lambda other: rescale(other, base, k)
        plans["rescaled bfloat16"] = lambda other: cast_to(rescale(other, base, k), torch.bfloat16)
        plans["rescaled float16"] = lambda other: cast_to(rescale(other, base, k), torch.float16)
    if any(is_norm(name, (1,)) and adds_one(base, name) for name, _ in model.named_parameters()):
        plans["awq fold (1+w)/s-1"] = lambda other: fold(other, seen, base, right=True)
        plans["awq fold w/s"] = lambda other: fold(other, seen, base, right=False)
    reference = [answer_logits(model, example) for example in examples]
    outcomes = {}
    for number, (name, change) in enumerate(plans.items()):
        other = copy.deepcopy(model)
        change(other)
        outcomes[name] = trial(other, examples, reference)
        job.progress(number + 1, len(plans), "variants", f"{name}: mean KL {outcomes[name]['mean_kl']:.2g}")
    return outcomes


def cast_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Every parameter and buffer in `dtype`."""
    model.to(dtype)


@torch.no_grad()
def rescale(model: PreTrainedModel, base: Path, k: float) -> PreTrainedModel:
    """The residual stream times `k` in a model in memory; the same change as
    `tasks.engine.weights.rescale.rescaled`."""
    parameters = dict(model.named_parameters())
    for name, change in changes(parameters, base, k).items():
        parameters[name].copy_(change(parameters[name].float()))
    return model


@torch.no_grad()
def clip(model: PreTrainedModel, base: Path, percentile: float) -> PreTrainedModel:
    """Each norm's gains limited to the percentile of their magnitude, as the seeds did."""
    for name, parameter in model.named_parameters():
        if is_norm(name, tuple(parameter.shape)):
            one = float(adds_one(base, name))
            gains = parameter.double() + one
            limit = gains.abs().quantile(percentile / 100)
            parameter.copy_((gains.clamp(-limit, limit) - one).float())
    return model


def int8_inputs(model: PreTrainedModel, seen: Activations | None) -> None:
    """Every linear layer's input in 8 bits: one scale from calibration, or with `seen` None one for each token."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or (seen and name not in seen.linears) or name.endswith("lm_head"):
            continue
        largest = seen.linears[name].maxima.max() if seen else None
        module.register_forward_pre_hook(_rounding(largest))


def _rounding(largest: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        scale = x.abs().amax(-1, keepdim=True) if largest is None else largest.to(x)
        scale = scale.clamp(min=1e-30) / 127
        return ((x / scale).round().clamp(-127, 127) * scale, *inputs[1:])

    return hook


@torch.no_grad()
def fold(model: PreTrainedModel, seen: Activations, base: Path, right: bool) -> None:
    """AWQ's scales moved from the inputs into the norm before them, and out of it into the weights.

    The product stays when the gain is divided: w' = (1 + w) / s - 1. Dividing w, as for a norm that multiplies by w,
    gives another model (vllm-project/llm-compressor#2102).
    """
    modules = dict(model.named_modules())
    for name in list(modules):
        for norm, readers in FOLDS:
            if not name.endswith("." + norm):
                continue
            layer = name.removesuffix("." + norm)
            found = [f"{layer}.{reader}" for reader in readers if f"{layer}.{reader}" in seen.linears]
            if not found:
                continue
            strength = seen.linears[found[0]].mean_squares.sqrt().clamp(min=1e-6).pow(FOLD_STRENGTH)
            scale = (strength / (strength.max() * strength.min()).sqrt()).to(modules[name].weight)
            weight = modules[name].weight
            one = float(right and adds_one(base, f"{name}.weight"))
            weight.copy_((weight + one) / scale - one)
            for reader in found:
                modules[reader].weight.mul_(scale)

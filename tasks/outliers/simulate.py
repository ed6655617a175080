"""Trials of a changed model on held-out answers: other dtypes, rescale, clip, int8 activations, AWQ's fold.

Each is compared with the model in float32, teacher forced (`tasks.engine.compare.changed_model`).
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.core.job import Job
from tasks.engine.compare.agreement import answer_logits
from tasks.engine.compare.changed_model import compare_answers
from tasks.engine.data.chat_template import Example
from tasks.engine.models.family_registry import family_in
from tasks.engine.models.tensor_names import gain_offset, is_norm
from tasks.engine.weights.rescale import rescaling_factors
from tasks.outliers.activation_statistics import ActivationStatistics
from tasks.outliers.targets import AWQ_FOLD, NAIVE_AWQ_FOLD, STATIC_INT8, TOKEN_INT8

Outcome = dict[str, float]
FOLD_STRENGTH = 0.5  # AWQ searches 0 to 1 (arXiv 2306.00978); the middle is enough to see whether a fold is right


def simulate(
    model: PreTrainedModel, examples: list[Example], statistics: ActivationStatistics, base: Path, k: float | None,
    percentile: float, job: Job,
) -> dict[str, Outcome]:  # fmt: skip
    """Outcomes by trial for a model in float32; `k` is the rescale factor to try, None where none is needed."""
    changes_by_trial: dict[str, Callable[[PreTrainedModel], object]] = {
        "float32": lambda variant: variant,
        "bfloat16": lambda variant: cast_to(variant, torch.bfloat16),
        "float16": lambda variant: cast_to(variant, torch.float16),
        "clipped float32": lambda variant: clip(variant, base, percentile),
        STATIC_INT8: lambda variant: int8_inputs(variant, statistics),
        TOKEN_INT8: lambda variant: int8_inputs(variant, None),
    }
    if k is not None:
        changes_by_trial["rescaled float32"] = lambda variant: rescale(variant, base, k)
        changes_by_trial["rescaled bfloat16"] = lambda variant: cast_to(rescale(variant, base, k), torch.bfloat16)
        changes_by_trial["rescaled float16"] = lambda variant: cast_to(rescale(variant, base, k), torch.float16)
    if any(is_norm(name, (1,)) and gain_offset(base, name) for name, _ in model.named_parameters()):
        changes_by_trial[AWQ_FOLD] = lambda variant: awq_fold(variant, statistics, base)
        changes_by_trial[NAIVE_AWQ_FOLD] = lambda variant: awq_fold(variant, statistics, base, naive=True)
    reference = [answer_logits(model, example) for example in examples]
    outcomes = {}
    for number, (name, change) in enumerate(changes_by_trial.items()):
        variant = copy.deepcopy(model)
        change(variant)
        outcomes[name] = compare_answers(variant, examples, reference)
        progress = f"{name}: mean KL {outcomes[name]['mean_kl']:.2g}"
        job.progress(number + 1, len(changes_by_trial), "variants", progress)
    return outcomes


def cast_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Every parameter and buffer in `dtype`."""
    model.to(dtype)


@torch.no_grad()
def rescale(model: PreTrainedModel, base: Path, k: float) -> PreTrainedModel:
    """Multiplies the residual stream by `k` in memory, as `tasks.engine.weights.rescale` does on disk."""
    parameters = dict(model.named_parameters())
    for name, change in rescaling_factors(parameters, base, k).items():
        parameters[name].copy_(change(parameters[name].float()))
    return model


@torch.no_grad()
def clip(model: PreTrainedModel, base: Path, percentile: float) -> PreTrainedModel:
    """Clips each norm's gains at the percentile of their magnitude."""
    for name, parameter in model.named_parameters():
        if is_norm(name, tuple(parameter.shape)):
            offset = gain_offset(base, name)
            gains = parameter.double() + offset
            limit = gains.abs().quantile(percentile / 100)
            parameter.copy_((gains.clamp(-limit, limit) - offset).float())
    return model


def int8_inputs(model: PreTrainedModel, calibration: ActivationStatistics | None) -> None:
    """Rounds every linear layer's input to 8 bits: one scale a layer from `calibration`, or without it one a token."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.endswith("lm_head"):
            continue
        if calibration and name not in calibration.linears:
            continue
        largest = calibration.linears[name].maxima.max() if calibration else None
        module.register_forward_pre_hook(_rounding(largest))


def _rounding(largest: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        scale = x.abs().amax(-1, keepdim=True) if largest is None else largest.to(x)
        scale = scale.clamp(min=1e-30) / 127
        return ((x / scale).round().clamp(-127, 127) * scale, *inputs[1:])

    return hook


@torch.no_grad()
def awq_fold(model: PreTrainedModel, statistics: ActivationStatistics, base: Path, naive: bool = False) -> None:
    """Divides each norm by AWQ's scales s and multiplies the weights that read it by them (arXiv 2306.00978).

    The product stays when the gain is divided: w' = (1 + w) / s - 1. `naive` divides w, as is right for a norm that
    multiplies by w; where it multiplies by 1 + w that changes the model (vllm-project/llm-compressor#2102).
    """
    modules = dict(model.named_modules())
    norm_readers = family_in(base).norm_readers
    for name in list(modules):
        for norm, readers in norm_readers:
            if not name.endswith("." + norm):
                continue
            layer = name.removesuffix("." + norm)
            linears = [f"{layer}.{reader}" for reader in readers if f"{layer}.{reader}" in statistics.linears]
            if not linears:
                continue
            strength = statistics.linears[linears[0]].mean_squares.sqrt().clamp(min=1e-6).pow(FOLD_STRENGTH)
            scale = (strength / (strength.max() * strength.min()).sqrt()).to(modules[name].weight)
            weight = modules[name].weight
            offset = 0.0 if naive else gain_offset(base, f"{name}.weight")
            weight.copy_((weight + offset) / scale - offset)
            for linear in linears:
                modules[linear].weight.mul_(scale)

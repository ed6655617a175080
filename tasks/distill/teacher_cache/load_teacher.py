"""Loads the teacher and checks that decoder and LM head, run apart, give the model's own logits."""

import torch
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.distill.teacher_cache import TeacherCacheConfig
from tasks.engine.models.dtypes import pick_device
from tasks.engine.models.lm_head import check_head
from tasks.engine.models.load import load_model


def load_teacher(teacher: ModelDir, config: TeacherCacheConfig) -> PreTrainedModel:
    """The teacher in the config's precision. Raises BadConfig when decoder and head apart do not give its logits."""
    device, precision = pick_device(), config.teacher_precision
    bits = {"8bit": 8, "4bit": 4}.get(precision)
    if bits and device != "cuda":
        raise BadConfig(f"teacher_precision={precision} needs a CUDA device: set auto")
    options = {} if bits is None else {"four_bit": True} if bits == 4 else {"eight_bit": True}
    model = load_model(teacher, "auto" if bits else precision, device, **options)
    if config.clip_norms is not None:
        clip_norms(model, config.clip_norms)
    check_head(model)
    return model


@torch.no_grad()
def clip_norms(model: PreTrainedModel, quantile: float) -> float:
    """Clips all norms' weights at a quantile of their absolute values; returns that limit."""
    norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
    limit = float(torch.cat([p.flatten().float().abs() for p in norms]).quantile(quantile))
    for parameter in norms:
        parameter.clamp_(-limit, limit)
    return limit

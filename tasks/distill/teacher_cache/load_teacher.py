"""The teacher itself, loaded as the config says and shown to be what its body and its head make of it."""

import torch
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.distill.teacher_cache import StatesConfig
from tasks.engine.models.dtypes import pick_device
from tasks.engine.models.lm_head import check_head
from tasks.engine.models.load import load_model


def load_teacher(teacher: ModelDir, config: StatesConfig) -> PreTrainedModel:
    """The teacher, ready to be asked. Raises BadConfig when body and head taken apart are not the model."""
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
    """Clips every norm's weights to the quantile of all their absolute values, which is returned."""
    norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
    limit = float(torch.cat([p.flatten().float().abs() for p in norms]).quantile(quantile))
    for parameter in norms:
        parameter.clamp_(-limit, limit)
    return limit

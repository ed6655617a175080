"""A new LoRA adapter on a model, of the kind and on the modules that a config names."""

import re
from typing import cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.core.training_config import TrainingConfig
from tasks.engine.models.family_registry import family_of


def add_adapter(config: TrainingConfig, model: PreTrainedModel) -> PeftModel:
    """The model with a new adapter. Raises BadConfig when `target_modules` fit nothing."""
    family = family_of(model.config.model_type)
    excluded = rf".*({'|'.join((*family.towers, *family.never_adapted))}).*"
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha),
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=config.target_modules,
        exclude_modules=excluded if any(re.fullmatch(excluded, name) for name, _ in model.named_modules()) else None,
        task_type="CAUSAL_LM",
        inference_mode=False,
    )
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        choices = _possible_targets(linear, excluded)
        raise BadConfig(f"target_modules={config.target_modules}: {error} {choices}") from error
    adapted_names = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    for target in config.target_modules if isinstance(config.target_modules, list) else []:
        if not any(f".{name}".endswith(f".{target}") for name in adapted_names):  # peft takes it when another fits
            choices = _possible_targets(linear, excluded)
            raise BadConfig(f"target_modules: {target!r} fits nothing that is adapted. {choices}")
    return cast(PeftModel, adapted)


def _possible_targets(linear: list[str], excluded: str) -> str:
    """A sentence on the names that `target_modules` can take."""
    names = {name.rpartition(".")[2] for name in linear if not re.fullmatch(excluded, name)}
    return f"There are {', '.join(sorted(names - {'lm_head', 'embed_tokens'}))}"

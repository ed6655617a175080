"""Loads an adapter onto its base, every tensor checked, for inference or for continued training.

model = attach_adapter(model, ModelDir(base, adapter), device)
model = continue_adapter(config, model, ModelDir(base, adapter), device)     # continued fine-tuning
"""

import re
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, PeftType
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.weights.adapter_delta import Adapter
from tasks.engine.weights.nf4 import combine_four_bit
from tasks.engine.weights.safetensors_reader import stored_tensors

REMEDY = "Take the base that it was made on"


def attach_adapter(
    model: PreTrainedModel, directory: ModelDir, device: str, settings: LoraConfig | None = None
) -> PreTrainedModel:
    """The model with its directory's adapter, trainable where `settings` are given.

    Raises BadConfig for another model's adapter: peft alone skips tensors that fit nothing and makes up missing ones.
    """
    adapter = cast(Path, directory.adapter)
    try:
        adapted = PeftModel.from_pretrained(
            model, str(adapter), config=settings, is_trainable=settings is not None, torch_device=device,
            local_files_only=True,
        )  # fmt: skip
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        mismatch = " ".join(str(error).split("size mismatch for ")[1].split()).rstrip(".")
        raise BadConfig(f"{adapter} is no adapter of {directory.base}: {mismatch}. {REMEDY}") from error
    _check_loaded(adapted, directory.base, adapter)
    return cast(PreTrainedModel, adapted)


def continue_adapter(
    config: TrainingConfig, model: PreTrainedModel, directory: ModelDir, device: str
) -> PreTrainedModel:
    """The model with an earlier adapter, trainable: that adapter's rank, alpha and modules, the config's dropout.

    Raises BadConfig for an adapter that could not be merged afterwards.
    """
    adapter = cast(Path, directory.adapter)
    Adapter.read(adapter, combine_four_bit(stored_tensors(directory.base)))
    settings = LoraConfig.from_pretrained(str(adapter))
    settings.lora_dropout, settings.inference_mode = config.dropout, False
    return attach_adapter(model, directory, device, settings)


def ignored_settings(config: TrainingConfig, base: ModelDir) -> list[str]:
    """A sentence for each setting of `config` that the earlier adapter's own setting overrides.

    Raises BadConfig for an adapter that is no LoRA.
    """
    if base.adapter is None:
        return []
    if not (base.adapter / "adapter_config.json").is_file():
        raise BadConfig(f"{base.adapter} is no adapter directory in peft's layout: adapter_config.json is missing")
    settings = LoraConfig.from_pretrained(str(base.adapter))
    if settings.peft_type != PeftType.LORA:
        raise BadConfig(
            f"{base.adapter} is a {settings.peft_type.value} adapter: LoRA, rsLoRA and DoRA are trained on here"
        )
    pairs: dict[str, tuple[object, object]] = {
        "rank": (config.rank, settings.r),
        "alpha": (config.alpha, settings.lora_alpha),
        "use_rslora": (config.use_rslora, settings.use_rslora),
        "use_dora": (config.use_dora, settings.use_dora),
    }
    if config.target_modules != "all-linear":  # for which peft saves a list of modules
        pairs["target_modules"] = (_names(config.target_modules), _names(settings.target_modules))
    return [
        f"{name}={configured} is not used: the earlier adapter has {name}={stored}"
        for name, (configured, stored) in pairs.items()
        if configured != stored
    ]


def _names(modules: list[str] | set[str] | str | None) -> object:
    return modules if isinstance(modules, str) else sorted({name.rpartition(".")[2] for name in modules or []})


def _check_loaded(model: nn.Module, base: Path, adapter: Path) -> None:
    """Raises BadConfig where the adapter's tensors on disk and in the model are not the same ones."""
    tensors = stored_tensors(adapter, "adapter_model")
    stored = {_plain_name(name): tensor for name, tensor in tensors.items() if ".lora_" in name}
    loaded = {_plain_name(name): parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    lost = sorted(stored.keys() - loaded.keys()) or [
        name for name in stored if name in loaded and not _equal(loaded[name], stored[name].rows())
    ]
    if lost:
        raise BadConfig(
            f"{adapter} is no adapter of {base}: {len(lost)} of its {len(stored)} tensors have no place there, "
            f"{lost[0]} first. {REMEDY}"
        )
    missing = sorted(loaded.keys() - stored.keys())
    if missing:
        raise BadConfig(
            f"{adapter} is no adapter of {base}: it has nothing for {missing[0]} ({len(missing)} of {len(loaded)} "
            f"tensors). {REMEDY}"
        )


def _equal(parameter: Tensor, stored: Tensor) -> bool:
    return torch.equal(parameter.detach().cpu().flatten().float(), stored.flatten().float())


def _plain_name(name: str) -> str:
    """A tensor's name without what peft and versions of transformers put around it."""
    name = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
    return re.sub(r"^(model\.|language_model\.)+", "", name)

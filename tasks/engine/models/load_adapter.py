"""An adapter on its base: attached whole or refused, and what of an earlier one's settings goes before the config's.

model = attach(model, ModelDir(base, adapter), device)
model = trained_on(config, model, ModelDir(base, adapter), device)     # continued fine-tuning
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
from tasks.engine.weights.nf4 import unpacked
from tasks.engine.weights.safetensors_reader import stored_tensors

REMEDY = "Take the base that it was made on"


def attach(
    model: PreTrainedModel, directory: ModelDir, device: str, settings: LoraConfig | None = None
) -> PreTrainedModel:
    """The model with its directory's adapter, to be trained where `settings` are given.

    Raises BadConfig for another model's adapter: peft alone leaves out what has no place, and makes up what is missing.
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
        where = " ".join(str(error).split("size mismatch for ")[1].split()).rstrip(".")
        raise BadConfig(f"{adapter} is no adapter of {directory.base}: {where}. {REMEDY}") from error
    _check_arrived(adapted, directory.base, adapter)
    return cast(PreTrainedModel, adapted)


def trained_on(config: TrainingConfig, model: PreTrainedModel, directory: ModelDir, device: str) -> PreTrainedModel:
    """The model with an earlier adapter to train on: its rank, alpha and modules, the config's dropout.

    Raises BadConfig for an adapter that could not be merged afterwards.
    """
    adapter = cast(Path, directory.adapter)
    Adapter.read(adapter, unpacked(stored_tensors(directory.base)))
    settings = LoraConfig.from_pretrained(str(adapter))
    settings.lora_dropout, settings.inference_mode = config.dropout, False
    return attach(model, directory, device, settings)


def settings_of_adapter(config: TrainingConfig, base: ModelDir) -> list[str]:
    """Sentences on the settings that an earlier adapter decides in place of the config.

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
    if config.target_modules != "all-linear":  # for it peft writes down all that it found
        pairs["target_modules"] = (_names(config.target_modules), _names(settings.target_modules))
    return [
        f"{name}={asked} is not used: the earlier adapter has {name}={has}"
        for name, (asked, has) in pairs.items()
        if asked != has
    ]


def _names(modules: list[str] | set[str] | str | None) -> object:
    return modules if isinstance(modules, str) else sorted({name.rpartition(".")[2] for name in modules or []})


def _check_arrived(model: nn.Module, base: Path, adapter: Path) -> None:
    given = {_place(name): one for name, one in stored_tensors(adapter, "adapter_model").items() if ".lora_" in name}
    found = {_place(name): one for name, one in model.named_parameters() if ".lora_" in name}
    lost = sorted(given.keys() - found.keys()) or [
        name for name in given if name in found and not _same(found[name], given[name].rows())
    ]
    if lost:
        raise BadConfig(
            f"{adapter} is no adapter of {base}: {len(lost)} of its {len(given)} tensors have no place there, "
            f"{lost[0]} first. {REMEDY}"
        )
    fresh = sorted(found.keys() - given.keys())
    if fresh:
        raise BadConfig(
            f"{adapter} is no adapter of {base}: it has nothing for {fresh[0]} ({len(fresh)} of {len(found)} "
            f"tensors). {REMEDY}"
        )


def _same(parameter: Tensor, stored: Tensor) -> bool:
    return torch.equal(parameter.detach().cpu().flatten().float(), stored.flatten().float())


def _place(name: str) -> str:
    """A tensor's name without what peft and versions of transformers put around it."""
    name = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
    return re.sub(r"^(model\.|language_model\.)+", "", name)

"""Loads the text half of a checkpoint whose towers need libraries of their own; any other checkpoint whole.

model = load_text_model(ModelDir.parse("gemma-3n-e2b-it+runs/teacher"))
"""

from pathlib import Path
from typing import Any, cast

import transformers
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from tasks.core.errors import BadConfig, Corrupted
from tasks.core.refs import ModelDir
from tasks.engine.models.dtypes import pick_device, pick_dtype
from tasks.engine.models.family_registry import family_of
from tasks.engine.models.load import load_model
from tasks.engine.models.model_config import read_config
from tasks.engine.weights.safetensors_reader import stored_tensors


def load_text_model(model: ModelDir, precision: str = "auto", device: str | None = None) -> PreTrainedModel:
    """As `tasks.engine.models.load.load_model`, without the towers of families that have a `text_model`.

    Raises Corrupted when a tensor of the text model is missing, BadConfig when the adapter changes something else.
    """
    config = read_config(model.base)
    text_class, text = _text_class(config), family_of(config.model_type).text_model
    if text_class is None or text is None:
        return load_model(model, precision, device)
    device = device or pick_device()
    ignored = {"_keys_to_ignore_on_load_unexpected": list(text.ignored)}
    architecture: Any = type(text_class, (getattr(transformers, text_class),), ignored)
    loaded, info = architecture.from_pretrained(
        model.base,
        config=config.get_text_config(),
        dtype=pick_dtype(precision, device),
        device_map={"": device},
        local_files_only=True,
        key_mapping=dict(text.key_mapping),
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise Corrupted(f"{model.base}: {len(names)} tensors of the text model missing, {names[0]} first; get it anew")
    if model.adapter is not None:
        loaded = _with_adapter(loaded, model.adapter, device, dict(text.key_mapping))
    return cast(PreTrainedModel, loaded.eval())


def _text_class(config: PretrainedConfig) -> str | None:
    """transformers' class of the text half, where the checkpoint has towers that it leaves out."""
    text = family_of(config.model_type).text_model
    return text.classes.get((config.architectures or [""])[0]) if text else None


def _with_adapter(loaded: Any, adapter: Path, device: str, key_mapping: dict[str, str]) -> Any:
    adapted = PeftModel.from_pretrained(
        loaded, adapter, torch_device=device, local_files_only=True, key_mapping=key_mapping
    )
    stored = len(stored_tensors(adapter, "adapter_model"))
    loaded_tensors = sum("lora_" in name or "modules_to_save" in name for name, _ in adapted.named_parameters())
    if stored != loaded_tensors:
        raise BadConfig(
            f"{adapter} has {stored} tensors, of which {loaded_tensors} belong to the text model: an adapter of towers "
            "cannot be compared on text"
        )
    return adapted

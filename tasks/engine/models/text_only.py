"""The text half of a checkpoint with towers, for comparing what text makes of it.

model = load_text(ModelDir.parse("gemma-3n-e2b-it+runs/teacher"))

Gemma 3n's vision tower exists only in timm, which needs torchvision; text passes neither. Others are loaded whole.
"""

from pathlib import Path
from typing import Any, cast

import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig, Corrupted
from tasks.core.refs import ModelDir
from tasks.engine.models.load import load_model, pick_device, pick_dtype, read_config
from tasks.engine.weights.safetensors_reader import stored_tensors

HALVES = {"Gemma3nForConditionalGeneration": "Gemma3nForCausalLM"}
TOWERS = [r"^model\.(vision|audio)_tower\.", r"^model\.embed_(vision|audio)\."]
KEYS = {r"^model\.language_model\.": "model."}  # of the whole checkpoint, and what the text model calls them


def load_text(model: ModelDir, precision: str = "auto", device: str | None = None) -> PreTrainedModel:
    """As `tasks.engine.models.load.load_model`, without the towers where those need libraries of their own.

    Raises Corrupted when a tensor of the text model is missing, BadConfig when the adapter changes something else.
    """
    config = read_config(model.base)
    half = HALVES.get((config.architectures or [""])[0])
    if half is None:
        return load_model(model, precision, device)
    device = device or pick_device()
    stays: dict[str, Any] = {"_keys_to_ignore_on_load_unexpected": TOWERS}
    loads: Any = type(half, (getattr(transformers, half),), stays)
    loaded, info = loads.from_pretrained(
        model.base,
        config=config.get_text_config(),
        dtype=pick_dtype(precision, device),
        device_map={"": device},
        local_files_only=True,
        key_mapping=KEYS,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise Corrupted(f"{model.base}: {len(names)} tensors of the text model missing, {names[0]} first; get it anew")
    if model.adapter is not None:
        loaded = _adapted(loaded, model.adapter, device)
    return cast(PreTrainedModel, loaded.eval())


def adapter_keys(model: ModelDir) -> dict[str, str] | None:
    """peft's `key_mapping` for a further adapter of a model that `load_text` loaded; None where names are the same."""
    return KEYS if (read_config(model.base).architectures or [""])[0] in HALVES else None


def _adapted(loaded: Any, adapter: Path, device: str) -> Any:
    adapted = PeftModel.from_pretrained(loaded, adapter, torch_device=device, local_files_only=True, key_mapping=KEYS)
    given = len(stored_tensors(adapter, "adapter_model"))
    taken = sum("lora_" in name or "modules_to_save" in name for name, _ in adapted.named_parameters())
    if given != taken:
        raise BadConfig(
            f"{adapter} has {given} tensors, of which {taken} belong to the text model: an adapter of towers cannot be "
            "compared on text"
        )
    return adapted

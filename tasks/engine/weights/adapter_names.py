"""Matches an adapter's tensors to the base's by name, and refuses adapters that cannot be merged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tasks.core.errors import BadConfig
from tasks.engine.weights.nf4 import FourBitTensor
from tasks.engine.weights.safetensors_reader import StoredTensor

# Options whose adapters compute more than W + s B A, or start from other weights than the base's.
UNMERGEABLE = (
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A module's path in transformers 5 and the same in older multimodal checkpoints.
SPELLINGS = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def base_name(target: str, base: Mapping[str, StoredTensor | FourBitTensor]) -> str | None:
    """The base's name of the tensor that an adapter names `target`, or None."""
    if target in base:
        return target
    for module, checkpoint in SPELLINGS:
        if target.startswith(module) and checkpoint + target.removeprefix(module) in base:
            return checkpoint + target.removeprefix(module)
    return None


def is_copy(
    stored: StoredTensor,
    name: str | None,
    target: str,
    tensors: dict[str, StoredTensor],
    base: Mapping[str, StoredTensor | FourBitTensor],
) -> bool:
    """Whether a tensor that peft saved whole equals the base's: an unchanged embedding, or the head tied to it."""
    twins: list[StoredTensor | FourBitTensor] = [base[name]] if name else []
    if name is None and target.endswith("lm_head.weight"):
        twins = [tensors[key] for key in tensors if key.endswith("embed_tokens.weight")]
        twins = twins or [base[key] for key in base if key.endswith("embed_tokens.weight")]
    return any(twin.shape == stored.shape and torch.equal(twin.rows(), stored.rows().to(twin.dtype)) for twin in twins)


def why_unmatched(target: str) -> str:
    """Why `base_name` matches nothing, as the end of a sentence that names the tensor."""
    if target.endswith("lm_head.weight"):
        return (
            "changes lm_head, which this base ties to its embedding: merging would untie them. Leave lm_head out of "
            "target_modules and modules_to_save"
        )
    return "matches no tensor of the base; is this the adapter of another model?"


def check_mergeable(directory: Path, config: dict[str, Any]) -> None:
    """Raises BadConfig for an adapter that computes more than W + s B A, or started from other weights."""
    if config.get("peft_type") != "LORA":
        raise BadConfig(f"{directory}: a {config.get('peft_type')} adapter cannot be merged; LoRA, rsLoRA and DoRA can")
    for option in UNMERGEABLE:
        if config.get(option):
            raise BadConfig(f"{directory}: {option}={config[option]!r} cannot be merged; train the adapter without it")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(RESIDUAL_INITS):
        raise BadConfig(
            f"{directory}: init_lora_weights={init!r} changes the base as it starts, so this base is not the one that "
            "the adapter was trained on. Save the adapter with peft's path_initial_model_for_weight_conversion"
        )

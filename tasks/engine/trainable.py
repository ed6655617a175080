"""What of a model is trained, and how the result is written: adapters (LoRA, QLoRA) or all weights."""

import re
import shutil
from pathlib import Path
from typing import Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.core.training import TrainingConfig
from tasks.engine.head import check_head, head_of, unwrap
from tasks.engine.load import TOWERS, load_model, load_tokenizer, read_config

Method = Literal["lora", "qlora", "full"]
MAX_SHARD = "2GB"
# What a tokenizer and a processor consist of: copied byte for byte, since saving them anew writes machine paths.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


def trainable_model(config: TrainingConfig, method: Method, base: ModelDir, device: str) -> PreTrainedModel:
    """The base with its trained parameters in float32: new adapters, or every weight outside the towers.

    Raises BadConfig when `base` carries an adapter (merge it first) or `target_modules` fit nothing.
    """
    if base.adapter is not None:
        raise BadConfig(f"{base} carries an adapter: merge it into its base first and train the merged model")
    model = load_model(base, "float32" if method == "full" else config.precision, device, four_bit=method == "qlora")
    check_head(model)
    torch.manual_seed(config.seed)
    if method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(tower in name for tower in TOWERS))
    else:
        model = cast(PreTrainedModel, _with_adapters(config, model))
    head_of(model)  # raises when the head carries an adapter
    if config.gradient_checkpointing:
        unwrap(model).gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _with_adapters(config: TrainingConfig, model: PreTrainedModel) -> PeftModel:
    never = rf".*({'|'.join((*TOWERS, 'altup'))}).*"
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha),
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=config.target_modules,
        exclude_modules=never if any(re.fullmatch(never, name) for name, _ in model.named_modules()) else None,
        task_type="CAUSAL_LM",
        inference_mode=False,
    )
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        raise BadConfig(f"target_modules={config.target_modules}: {error}") from error
    return cast(PeftModel, adapted)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """`parameters` and `trainable_parameters`; a 4-bit weight counts by its elements, not its bytes."""
    counts = {"parameters": 0, "trainable_parameters": 0}
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8
        counts["parameters"] += parameter.numel() * (2 if packed else 1)
        counts["trainable_parameters"] += parameter.numel() if parameter.requires_grad else 0
    return counts


def round_to_base(model: PreTrainedModel, method: Method, base: ModelDir) -> None:
    """Rounds fully trained weights to the dtype that they will be saved in, so that validation sees what is saved."""
    if method == "full":
        model.to(_saved_dtype(base)).to(torch.float32)  # type: ignore[arg-type]


def save_trained(model: PreTrainedModel, method: Method, base: ModelDir, chat_template: str, out: Path) -> None:
    """A PEFT adapter directory, or a model directory with the base's config, dtype and tied weights; tokenizer too."""
    if method == "full":
        model.to(_saved_dtype(base)).save_pretrained(out, max_shard_size=MAX_SHARD)  # type: ignore[arg-type]
        for name in ("config.json", "generation_config.json"):
            if (base.base / name).is_file():
                shutil.copyfile(base.base / name, out / name)
    else:
        peft = cast(PeftModel, model)
        peft.peft_config["default"].base_model_name_or_path = "base"  # a path of this machine means nothing elsewhere
        peft.save_pretrained(str(out), save_embedding_layers=False)
        (out / "README.md").unlink(missing_ok=True)  # peft's empty model card
    copy_tokenizer(base.base, out, chat_template)


def copy_tokenizer(source: Path, out: Path, chat_template: str = "model") -> None:
    """Copies a model's tokenizer and processor files, with the chat template that `chat_template` chooses."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if chat_template != "model":
        template = load_tokenizer(ModelDir(source), chat_template).chat_template
        (out / "chat_template.jinja").write_text(cast(str, template), encoding="utf-8")


def _saved_dtype(base: ModelDir) -> torch.dtype:
    return cast(torch.dtype, read_config(base.base).dtype or torch.float32)

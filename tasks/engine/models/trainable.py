"""What of a model is trained, and how the result is written: adapters (LoRA, QLoRA) or all weights."""

import json
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
from tasks.core.training_config import TrainingConfig
from tasks.engine.models.float16 import keep_range
from tasks.engine.models.lm_head import check_head, head_of, unwrap
from tasks.engine.models.load import TOWERS, is_four_bit, load_model, load_tokenizer, read_config
from tasks.engine.models.load_adapter import trained_on

Method = Literal["lora", "qlora", "full"]
MAX_SHARD = "2GB"
# What a tokenizer and a processor consist of: copied byte for byte, since saving them anew writes machine paths.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


def trainable_model(config: TrainingConfig, method: Method, base: ModelDir, device: str) -> PreTrainedModel:
    """The base with its trained parameters in float32: adapters, or every weight outside the towers.

    Where `base` carries an adapter, that adapter is trained on, with its own rank, alpha and modules, or merged into
    the weights that `full` trains. Raises BadConfig when `target_modules` fit nothing, or for `full` in 4 bits.
    """
    if method == "full" and is_four_bit(read_config(base.base)):
        raise BadConfig(f"{base.base} lies in 4 bits, which cannot be trained themselves: set method=qlora")
    bare, precision = ModelDir(base.base), "float32" if method == "full" else config.precision
    model = load_model(base if method == "full" else bare, precision, device, four_bit=method == "qlora")
    check_head(model)
    torch.manual_seed(config.seed)
    if method == "full":
        if isinstance(model, PeftModel):
            model = cast(PreTrainedModel, model.merge_and_unload())
        if config.precision == "float16":
            keep_range(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(tower in name for tower in TOWERS))
    elif base.adapter is not None:
        model = trained_on(config, model, base, device)
    else:
        model = cast(PreTrainedModel, with_adapters(config, model))
    head_of(model)  # raises when the head carries an adapter
    _check_embedding(model)
    return model


def with_adapters(config: TrainingConfig, model: PreTrainedModel) -> PeftModel:
    """The model with new adapters. Raises BadConfig when `target_modules` fit nothing."""
    never = rf".*({'|'.join((*TOWERS, 'altup'))}).*"
    named = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
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
        raise BadConfig(f"target_modules={config.target_modules}: {error} {_there_are(named, never)}") from error
    adapted_names = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    for target in config.target_modules if isinstance(config.target_modules, list) else []:
        if not any(f".{name}".endswith(f".{target}") for name in adapted_names):  # peft takes it when another fits
            raise BadConfig(f"target_modules: {target!r} fits nothing that is adapted. {_there_are(named, never)}")
    return cast(PeftModel, adapted)


def _there_are(named: list[str], never: str) -> str:
    """A sentence on the names that `target_modules` can take."""
    last = {name.rpartition(".")[2] for name in named if not re.fullmatch(never, name)} - {"lm_head", "embed_tokens"}
    return f"There are {', '.join(sorted(last))}"


def _check_embedding(model: nn.Module) -> None:
    """Raises BadConfig for an adapter on an embedding that is the head as well, which would not get it."""
    embedding = unwrap(model).get_input_embeddings()
    base = getattr(embedding, "base_layer", None)
    if base is not None and base.weight is head_of(model).weight:
        raise BadConfig(
            "target_modules: the embedding is the head as well, which would not get its adapter: leave it out"
        )


def count_parameters(model: nn.Module) -> dict[str, int]:
    """`parameters` and `trainable_parameters`; a 4-bit weight counts by its elements, not its bytes."""
    counts = {"parameters": 0, "trainable_parameters": 0}
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8
        counts["parameters"] += parameter.numel() * (2 if packed else 1)
        counts["trainable_parameters"] += parameter.numel() if parameter.requires_grad else 0
    return counts


def round_to_saved(model: PreTrainedModel, method: Method, base: ModelDir, dtype: torch.dtype | None = None) -> None:
    """Rounds fully trained weights to the dtype that they will be saved in, so that validation sees what is saved."""
    if method == "full":
        model.to(dtype or _saved_dtype(base)).to(torch.float32)  # type: ignore[arg-type]


def save_trained(
    model: PreTrainedModel,
    method: Method,
    base: ModelDir,
    chat_template: str,
    out: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """A PEFT adapter directory, or a model directory with the base's config and tied weights; tokenizer too.

    A whole model is saved in the base's dtype, or in `dtype`, which its config then names.
    """
    if method == "full":
        model.to(dtype or _saved_dtype(base)).save_pretrained(out, max_shard_size=MAX_SHARD)  # type: ignore[arg-type]
        for name in ("config.json", "generation_config.json"):
            if (base.base / name).is_file():
                shutil.copyfile(base.base / name, out / name)
        if dtype is not None:
            _name_dtype(out / "config.json", str(dtype).removeprefix("torch."))
    else:
        peft = cast(PeftModel, model)
        peft.peft_config["default"].base_model_name_or_path = "base"  # a path of this machine means nothing elsewhere
        peft.save_pretrained(str(out), save_embedding_layers=False)
        _sort_modules(out / "adapter_config.json")
        (out / "README.md").unlink(missing_ok=True)  # peft's empty model card
    copy_tokenizer(base, out, chat_template)


def copy_tokenizer(model: ModelDir, out: Path, chat_template: str = "model") -> None:
    """Copies a model's tokenizer and processor files, with the chat template that `chat_template` chooses.

    The adapter's tokenizer, if it brought one, is what the rows were read with; what it lacks comes from the base.
    """
    own = model.adapter if model.adapter and (model.adapter / "tokenizer_config.json").is_file() else None
    for name in TOKENIZER_FILES:
        source = own or model.base
        if own and not (own / name).is_file() and not name.startswith("chat_template"):
            source = model.base
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if chat_template != "model":
        template = load_tokenizer(model, chat_template).chat_template
        (out / "chat_template.jinja").write_text(cast(str, template), encoding="utf-8")


def _sort_modules(file: Path) -> None:
    """peft writes sets in the order of Python's hashes, which is another in every process."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _name_dtype(file: Path, dtype: str) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = dtype
    config.pop("torch_dtype", None)  # its older name
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _saved_dtype(base: ModelDir) -> torch.dtype:
    return cast(torch.dtype, read_config(base.base).dtype or torch.float32)

"""Writes a trained model: an adapter in peft's layout, or a whole model with the base's config and dtype."""

import json
import shutil
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tasks.core.refs import ModelDir
from tasks.engine.data.tokenizers import copy_tokenizer
from tasks.engine.models.model_config import read_config
from tasks.engine.models.trainable import Method

MAX_SHARD = "2GB"


def round_to_saved_dtype(
    model: PreTrainedModel, method: Method, base: ModelDir, dtype: torch.dtype | None = None
) -> None:
    """Rounds fully trained weights to the dtype that they will be saved in, so that validation sees what is saved."""
    if method == "full":
        model.to(dtype or _base_dtype(base)).to(torch.float32)  # type: ignore[arg-type]


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
        model.to(dtype or _base_dtype(base)).save_pretrained(out, max_shard_size=MAX_SHARD)  # type: ignore[arg-type]
        for name in ("config.json", "generation_config.json"):
            if (base.base / name).is_file():
                shutil.copyfile(base.base / name, out / name)
        if dtype is not None:
            _set_dtype(out / "config.json", str(dtype).removeprefix("torch."))
    else:
        peft = cast(PeftModel, model)
        peft.peft_config["default"].base_model_name_or_path = "base"  # a path of this machine means nothing elsewhere
        peft.save_pretrained(str(out), save_embedding_layers=False)
        _sort_modules(out / "adapter_config.json")
        (out / "README.md").unlink(missing_ok=True)  # peft's empty model card
    copy_tokenizer(base, out, chat_template)


def _sort_modules(file: Path) -> None:
    """peft writes sets in the order of Python's hashes, which is another in every process."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _set_dtype(file: Path, dtype: str) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = dtype
    config.pop("torch_dtype", None)  # its older name
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _base_dtype(base: ModelDir) -> torch.dtype:
    return cast(torch.dtype, read_config(base.base).dtype or torch.float32)

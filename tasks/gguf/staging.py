"""Prepares a Hugging Face model directory for llama.cpp's converter."""

import json
import shutil
from pathlib import Path
from typing import Any

from tasks.engine.weights.safetensors_reader import stored_tensors

DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def stored_type(model: Path) -> str:
    """The type that holds the model's matrices without rounding: their own where all have the same, else F32."""
    dtypes = {str(tensor.dtype) for tensor in stored_tensors(model).values() if len(tensor.shape) > 1}
    return DTYPES.get(dtypes.pop(), "F32") if len(dtypes) == 1 else "F32"


def stage_for_converter(model: Path, staged: Path) -> Path:
    """Links the model's files into `staged`, and adds the added tokens to tokenizer_config.json.

    transformers 5 no longer writes `added_tokens_decoder` there; without it the converter takes `<start_of_turn>` for
    plain text, and llama.cpp tokenizes every chat prompt otherwise than training did.
    """
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file():
            (staged / file.name).symlink_to(file.resolve())
    config, tokenizer = staged / "tokenizer_config.json", staged / "tokenizer.json"
    if config.is_file() and tokenizer.is_file():
        settings: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        added = json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", [])
        settings.setdefault(
            "added_tokens_decoder",
            {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added},
        )
        config.unlink()  # the link, not what it points to
        config.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
    return staged

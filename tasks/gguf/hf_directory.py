"""A Hugging Face directory as llama.cpp's converter wants to find it."""

import json
import shutil
from pathlib import Path
from typing import Any

from tasks.engine.weights.safetensors_reader import stored_tensors

DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def stored_type(model: Path) -> str:
    """The 16- or 32-bit type that holds the model's matrices without rounding: most matrices' own, or F32."""
    found = {str(tensor.dtype) for tensor in stored_tensors(model).values() if len(tensor.shape) > 1}
    return DTYPES.get(found.pop(), "F32") if len(found) == 1 else "F32"


def stage(model: Path, staged: Path) -> Path:
    """`model` as links, with the token list in tokenizer_config.json that the converter looks for.

    transformers 5 no longer writes `added_tokens_decoder` there; without it the converter takes `<start_of_turn>` for
    plain text, and llama.cpp tokenizes every chat prompt otherwise than the model was trained on.
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

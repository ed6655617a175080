"""A model directory's config.json: read and checked, and the transformers class that it names."""

from pathlib import Path
from typing import Any, cast

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tasks.core.errors import BadConfig


def read_config(base: Path) -> PretrainedConfig:
    """`config.json` of a model directory; BadConfig when it is missing or of an unknown kind."""
    require_file(base, "config.json", "the architecture")
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(base, local_files_only=True))
    except (ValueError, KeyError, OSError) as error:
        raise BadConfig(f"{base}/config.json: {error}") from error


def is_four_bit(config: PretrainedConfig) -> bool:
    """Whether a checkpoint is stored in bitsandbytes' 4 bits. BadConfig for another quantization."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return False
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if settings.get("quant_method") != "bitsandbytes" or not settings.get("load_in_4bit"):
        raise BadConfig(
            f"a checkpoint quantized by {settings.get('quant_method')} cannot be trained: take its original"
        )
    return True


def model_class(config: PretrainedConfig) -> Any:
    """The class that config.json names: a multimodal checkpoint keeps its towers, unlike with AutoModelForCausalLM."""
    names = config.architectures or []
    if not names:
        return AutoModelForCausalLM
    architecture = getattr(transformers, names[0], None)
    if architecture is None:
        raise BadConfig(f"architecture {names[0]!r} is not in transformers {transformers.__version__}")
    return architecture


def require_file(directory: Path, pattern: str, content: str) -> None:
    """Raises BadConfig where no file of `directory` matches `pattern`; `content` says what such a file holds."""
    if not directory.is_dir():
        raise BadConfig(f"{directory} is not a directory; give a model directory in Hugging Face's layout")
    if not any(directory.glob(pattern)):
        raise BadConfig(f"{directory} is not a whole model directory: {pattern} ({content}) is missing")

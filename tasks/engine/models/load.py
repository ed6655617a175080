"""Reading a model directory: the right class, every tensor, an adapter on top, the device's dtype.

model = load_model(ModelDir.parse("bases/gemma-3-1b-it+runs/teacher"))
tokenizer = load_tokenizer(ModelDir.parse("bases/gemma-3-1b-it"))
"""

import re
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from tasks.core.errors import BadConfig, Corrupted
from tasks.core.refs import ModelDir
from tasks.engine.models.float16 import is_refused, keep_range, reading_norms_in_float32
from tasks.engine.models.load_adapter import attach

# Gemma 3's own turns for text: it has no system role, so a system message opens the first user turn.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% set has_system = messages[0]['role'] == 'system' %}"
    "{% for message in (messages[1:] if has_system else messages) %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
    "+ (messages[0]['content'] | trim + '\n\n' if has_system and loop.first else '') "
    "+ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Modules of vision and audio: never trained and never quantized here (Gemma 3, Gemma 3n).
TOWERS = ("vision_tower", "audio_tower", "multi_modal_projector", "embed_vision", "embed_audio")
# Gemma 3n clamps `prediction_coefs.weight` in place, which a packed uint8 weight cannot bear; naming the parent
# `altup` alone does not keep its children from being quantized (unsloth#3650), so the leaves are named.
NEVER_4BIT = (
    "correction_coefs",
    "prediction_coefs",
    "modality_router",
    "altup_projections",
    "altup_unembed_projections",
    "lm_head",
)


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device() -> str:
    """`cuda` if there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(precision: str, device: str) -> torch.dtype:
    """What frozen weights are kept in. `auto` is bfloat16 on a CUDA device that has it, else float32.

    In float16 only matrices are kept (tasks.engine.models.float16): Gemma 3's residual stream passes its largest
    number.
    """
    if precision == "auto":
        return torch.bfloat16 if device.startswith("cuda") and _has_bfloat16() else torch.float32
    if precision not in DTYPES:
        raise BadConfig(f"precision {precision!r} is none of auto, {', '.join(DTYPES)}")
    return DTYPES[precision]


def training_precision(precision: str, base: Path, device: str) -> str:
    """What training multiplies in where the config says `auto`: the first of bfloat16, float16 and float32 that the
    device has and the architecture bears."""
    if precision != "auto":
        return precision
    if not device.startswith("cuda"):
        return "float32"
    if _has_bfloat16():
        return "bfloat16"
    return "float32" if is_refused(read_config(base).get_text_config().model_type) else "float16"


def _has_bfloat16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def load_tokenizer(model: ModelDir, chat_template: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter if it brought one, else the base's.

    `chat_template` is `model` (its own) or `gemma` (Gemma's turns, for a base model that has none).
    """
    adapted = model.adapter is not None and (model.adapter / "tokenizer_config.json").is_file()
    directory = model.adapter if adapted and model.adapter else model.base
    _need(directory, "tokenizer_config.json", "the tokenizer")
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(directory, local_files_only=True))
    if chat_template == "gemma":
        if "<start_of_turn>" not in tokenizer.get_vocab():
            raise BadConfig(
                f"{directory}: no <start_of_turn> in the vocabulary, so chat_template=gemma does not fit it"
            )
        tokenizer.chat_template = GEMMA_TEMPLATE
    return tokenizer


def load_model(
    model: ModelDir,
    precision: str = "auto",
    device: str | None = None,
    four_bit: bool = False,
    eight_bit: bool = False,
) -> PreTrainedModel:
    """The model in evaluation mode on `device`, its adapter attached unmerged.

    `precision` is as in `pick_dtype`; `four_bit` stores the linear layers as NF4 with double quantization, but for the
    head, the towers and what does not survive it; `eight_bit` stores them in bitsandbytes' 8 bits, for inference. A
    checkpoint that is in 4 bits on disk stays as it is.
    Raises BadConfig for a directory that is no model or another model's adapter, Corrupted when a tensor is missing.
    """
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # progress is told by `Job`
    device = device or pick_device()
    config = read_config(model.base)
    _need(model.base, "*.safetensors", "the weights")
    packed, dtype = is_four_bit(config), pick_dtype(precision, device)
    options: dict[str, Any] = {"quantization_config": _nf4(dtype)} if four_bit and not packed else {}
    if eight_bit and not packed:
        options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_skipped())}  # type: ignore[no-untyped-call]
    loads = model_class(config)
    if dtype == torch.float16:
        loads = reading_norms_in_float32(loads)
    loaded, info = loads.from_pretrained(
        model.base,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise Corrupted(
            f"{model.base}: {len(names)} tensors missing or of another shape, {names[0]} first; get it anew"
        )
    if four_bit or packed:
        _assert_not_4bit(loaded)
        _compute_in(loaded, dtype)
    if dtype == torch.float16:
        keep_range(loaded)
    cap_scores(loaded)
    if model.adapter is not None:
        _need(model.adapter, "adapter_model.safetensors", "the adapter's weights")
        loaded = attach(loaded, model, device)
    return cast(PreTrainedModel, loaded.eval())


def read_config(base: Path) -> PretrainedConfig:
    """`config.json` of a model directory; BadConfig when it is not there or of an unknown kind."""
    _need(base, "config.json", "the architecture")
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(base, local_files_only=True))
    except (ValueError, KeyError, OSError) as error:
        raise BadConfig(f"{base}/config.json: {error}") from error


def is_four_bit(config: PretrainedConfig) -> bool:
    """Whether a checkpoint lies in bitsandbytes' 4 bits on disk. BadConfig for another quantization."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return False
    settings = found if isinstance(found, dict) else found.to_dict()
    if settings.get("quant_method") != "bitsandbytes" or not settings.get("load_in_4bit"):
        raise BadConfig(
            f"a checkpoint quantized by {settings.get('quant_method')} cannot be trained: take its original"
        )
    return True


def cap_scores(model: PreTrainedModel) -> None:
    """Where attention's scores are capped (Gemma 2), transformers' plain attention: the others leave the cap out."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        parts = [name for name in model.config.sub_configs if getattr(model.config, name) is config]
        model.set_attn_implementation(dict.fromkeys(parts, "eager") if parts else "eager")


def _compute_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Sets the dtype that 4-bit layers multiply in, whatever the checkpoint was written for.

    On CPUs with AVX512-BF16, bitsandbytes would also repack the weights at the first inference: their scales are then
    rounded to bfloat16, and widths below a block of 64 raise. The weights stay as they are stored instead.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            layer = cast(Any, module)
            layer.compute_dtype, layer.support_avx512bf16_for_cpu = dtype, False


def model_class(config: PretrainedConfig) -> Any:
    """The class that config.json names: a multimodal checkpoint keeps its towers, unlike with AutoModelForCausalLM."""
    names = config.architectures or []
    if not names:
        return AutoModelForCausalLM
    found = getattr(transformers, names[0], None)
    if found is None:
        raise BadConfig(f"architecture {names[0]!r} is not in transformers {transformers.__version__}")
    return found


def _nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=_skipped(),
    )


def _skipped() -> list[str]:
    return [f".*{name}" for name in (*NEVER_4BIT, *TOWERS)]


def _assert_not_4bit(model: torch.nn.Module) -> None:
    """Raises when a module that breaks in 4 bits was quantized all the same."""
    never = re.compile("|".join((*NEVER_4BIT, *TOWERS)))
    for name, module in model.named_modules():
        if never.search(name) and type(module).__name__ == "Linear4bit":
            raise BadConfig(f"{name} was quantized to 4 bits, which it does not survive: set method=lora")


def _need(directory: Path, pattern: str, what: str) -> None:
    if not directory.is_dir():
        raise BadConfig(f"{directory} is not a directory; give a model directory in Hugging Face's layout")
    if not any(directory.glob(pattern)):
        raise BadConfig(f"{directory} is not a whole model directory: {pattern} ({what}) is missing")

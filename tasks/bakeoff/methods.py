"""Quantization methods, each a few lines around its library: a source model in, a quantized model that runs out.

Imported by flows: no module-level import of torch or of a library; each function imports its own.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.bakeoff.registry import method

if TYPE_CHECKING:
    from tasks.bakeoff.source_model import QuantizedModel, SourceModel

GROUP = 32  # values a scale, as in GGUF: it divides every Gemma 3 width
INT8_ACTIVATIONS = ("int8_activations",)
NO_SCALES = "int8 activations without calibration have no scales"


@method("none", "cast only")
def cast_only(source: SourceModel) -> QuantizedModel:
    """The model in the config's dtype, not quantized."""
    return source.in_memory(source.load())


@method("bnb-int8", "bitsandbytes LLM.int8", library="bitsandbytes")
def bnb_int8(source: SourceModel) -> QuantizedModel:
    """LLM.int8 (arXiv 2208.07339): int8 weights by row and activations by token, columns beyond 6 in 16 bits."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every layer and row
    warnings.filterwarnings("ignore", message="MatMul8bitLt", category=UserWarning)
    return source.in_memory(source.load(quantization_config=_bnb_config(load_in_8bit=True)))


@method("bnb-nf4", "bitsandbytes NF4, double quantization", library="bitsandbytes")
def bnb_nf4(source: SourceModel) -> QuantizedModel:
    """NF4 with double quantization (arXiv 2305.14314), multiplied in the source's dtype."""
    config = _bnb_config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=source.dtype,
    )
    return source.in_memory(source.load(quantization_config=config))


@method("quanto-int8", "Quanto int8, int8 activations", library="optimum-quanto", targets=INT8_ACTIVATIONS)
def quanto_int8(source: SourceModel) -> QuantizedModel:
    """int8 weights, and int8 activations at calibrated scales."""
    return _quanto(source, "qint8", "qint8", calibrate=True)


@method("quanto-int4", "Quanto int4, int8 activations", library="optimum-quanto", targets=INT8_ACTIVATIONS)
def quanto_int4(source: SourceModel) -> QuantizedModel:
    """int4 weights, and int8 activations at calibrated scales."""
    return _quanto(source, "qint4", "qint8", calibrate=True)


@method("quanto-int8-uncalibrated", "Quanto int8, no calibration", library="optimum-quanto", unsafe_reason=NO_SCALES)
def quanto_int8_uncalibrated(source: SourceModel) -> QuantizedModel:
    """int8 weights, and int8 activations at Quanto's initial scales."""
    return _quanto(source, "qint8", "qint8")


@method("quanto-int4-uncalibrated", "Quanto int4, no calibration", library="optimum-quanto", unsafe_reason=NO_SCALES)
def quanto_int4_uncalibrated(source: SourceModel) -> QuantizedModel:
    """int4 weights, and int8 activations at Quanto's initial scales."""
    return _quanto(source, "qint4", "qint8")


@method("quanto-int8-weights", "Quanto int8, weights only", library="optimum-quanto")
def quanto_int8_weights(source: SourceModel) -> QuantizedModel:
    """int8 weights."""
    return _quanto(source, "qint8")


@method("torchao-int8", "torchao int8, weights only", library="torchao")
def torchao_int8(source: SourceModel) -> QuantizedModel:
    """int8 weights."""
    return _torchao(source, "Int8WeightOnlyConfig")


@method("torchao-int8-activations", "torchao int8, dynamic int8 activations", library="torchao",
        targets=INT8_ACTIVATIONS)  # fmt: skip
def torchao_int8_activations(source: SourceModel) -> QuantizedModel:
    """int8 weights, and int8 activations with a scale for each token."""
    return _torchao(source, "Int8DynamicActivationInt8WeightConfig")


@method("torchao-int4", "torchao int4, weights only", library="torchao")
def torchao_int4(source: SourceModel) -> QuantizedModel:
    """int4 weights in groups along the inputs."""
    return _torchao(source, "Int4WeightOnlyConfig", group_size=GROUP)


@method("gptq", "llm-compressor GPTQ", library="llmcompressor")
def gptq(source: SourceModel) -> QuantizedModel:
    """GPTQ (arXiv 2210.17323): 4 bits a weight, groups along the inputs, symmetric."""
    library = import_module("llmcompressor.modifiers.gptq")
    return _llm_compressor(source, [library.GPTQModifier(**_w4a16(symmetric=True))])


@method("awq", "llm-compressor AWQ", library="llmcompressor", needs_gpu=True)
def awq(source: SourceModel) -> QuantizedModel:
    """AWQ (arXiv 2306.00978): scales moved into the norms, then 4 bits a weight, asymmetric."""
    scaling = import_module("llmcompressor.modifiers.transform.awq")
    rounding = import_module("llmcompressor.modifiers.quantization")
    return _llm_compressor(source, [scaling.AWQModifier(), rounding.QuantizationModifier(**_w4a16(symmetric=False))])


def _bnb_config(**options: Any) -> Any:
    return import_module("transformers").BitsAndBytesConfig(**options)


def _quanto(
    source: SourceModel, weights: str, activations: str | None = None, calibrate: bool = False
) -> QuantizedModel:
    """Quanto on every linear layer but the LM head."""
    library = import_module("optimum.quanto")
    model = source.load()
    types = {"weights": getattr(library, weights), "activations": activations and getattr(library, activations)}
    library.quantize(model, exclude="lm_head", **types)
    if calibrate:
        with library.Calibration():
            source.calibrate(model)
    library.freeze(model)
    return source.in_memory(model)


def _torchao(source: SourceModel, config: str, **options: Any) -> QuantizedModel:
    """torchao's `quantize_` of every linear layer but the LM head; raises ValueError when it changed none."""
    library = import_module("torchao.quantization")
    model = source.load()
    library.quantize_(model, getattr(library, config)(**options), filter_fn=source.is_linear)
    if not source.has_packed_weights(model):
        raise ValueError(f"torchao's {config} quantized no layer: it has no kernel for these shapes or this device")
    return source.in_memory(model)


def _w4a16(symmetric: bool) -> dict[str, Any]:
    """A modifier's arguments for 4-bit weights in groups and 16-bit activations."""
    library = import_module("compressed_tensors.quantization")
    arguments = library.QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=symmetric
    )
    scheme = library.QuantizationScheme(targets=["Linear"], weights=arguments)
    return {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}


def _llm_compressor(source: SourceModel, recipe: list[Any]) -> QuantizedModel:
    """llm-compressor's `oneshot`, saved compressed and loaded again: its bytes are those on disk."""
    oneshot, datasets = import_module("llmcompressor").oneshot, import_module("datasets")
    rows = datasets.Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in source.rows])
    model = source.load()
    longest = max(map(len, source.rows))
    oneshot(
        model=model, dataset=rows, recipe=recipe, max_seq_length=longest, num_calibration_samples=len(rows),
        log_dir=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, save_compressed=True)
        return source.on_disk(Path(directory))

"""The methods, each a few lines around its library: a model directory and calibration rows in, a model that runs out.

A library that is not installed raises ImportError when its method is called; none of them is needed otherwise.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from tasks.engine.models.load import model_class, read_config

GROUP = 32  # values a scale, as in GGUF: it divides every Gemma 3 width


class Source(NamedTuple):
    """What a method starts from: token ids of `rows` [tokens] each, for those that calibrate."""

    directory: Path
    dtype: torch.dtype
    device: str
    rows: list[list[int]]

    def load(self, **options: Any) -> PreTrainedModel:
        """The model in `dtype`, not quantized unless `options` say so."""
        loads = model_class(read_config(self.directory))
        options = {"dtype": self.dtype, "device_map": {"": self.device}, "local_files_only": True} | options
        return cast(PreTrainedModel, loads.from_pretrained(self.directory, **options).eval())

    def run(self, model: PreTrainedModel) -> None:
        """The calibration rows through a model."""
        with torch.no_grad():
            for ids in self.rows:
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)


class Made(NamedTuple):
    """A model that runs, and its bytes: in memory, or `bytes` where the library packs only when it saves."""

    model: PreTrainedModel
    bytes: int


def none(source: Source) -> Made:
    """Only the cast."""
    return _made(source.load())


def bnb_int8(source: Source) -> Made:
    """LLM.int8 (arXiv 2208.07339): weights in 8 bits a row, activations too, but for columns beyond 6."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every layer and row
    warnings.filterwarnings("ignore", message="MatMul8bitLt", category=UserWarning)
    return _made(source.load(quantization_config=BitsAndBytesConfig(load_in_8bit=True)))  # type: ignore[no-untyped-call]


def bnb_nf4(source: Source) -> Made:
    """NF4 with double quantization (arXiv 2305.14314), multiplied in the source's dtype."""
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=source.dtype,
    )
    return _made(source.load(quantization_config=config))


def quanto(weights: str, activations: bool, calibrated: bool) -> Callable[[Source], Made]:
    """Quanto: integer weights and, with `activations`, int8 activations at scales that calibration has to find."""

    def method(source: Source) -> Made:
        library = import_module("optimum.quanto")

        model = source.load()
        kinds = {"weights": getattr(library, weights), "activations": library.qint8 if activations else None}
        library.quantize(model, exclude="lm_head", **kinds)
        if calibrated and activations:
            with library.Calibration():
                source.run(model)
        library.freeze(model)
        return _made(model)

    return method


def torchao(config: str, **options: Any) -> Callable[[Source], Made]:
    """torchao's `quantize_` of the linear layers but the head."""

    def method(source: Source) -> Made:
        library = import_module("torchao.quantization")

        model = source.load()
        library.quantize_(
            model,
            getattr(library, config)(**options),
            filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"),
        )
        if not any(hasattr(parameter, "__tensor_flatten__") for parameter in model.parameters()):
            raise ValueError(f"torchao's {config} quantized no layer: it has no kernel for these shapes or this device")
        return _made(model)

    return method


def gptq(source: Source) -> Made:
    """llm-compressor's GPTQ (arXiv 2210.17323): 4 bits a weight, groups along the inputs, symmetric."""
    library = import_module("llmcompressor.modifiers.gptq")
    return _compressed(source, [library.GPTQModifier(**_w4a16(symmetric=True))])


def awq(source: Source) -> Made:
    """llm-compressor's AWQ (arXiv 2306.00978): scales moved into the norms, then 4 bits a weight, asymmetric."""
    scales = import_module("llmcompressor.modifiers.transform.awq")
    rounds = import_module("llmcompressor.modifiers.quantization")
    return _compressed(source, [scales.AWQModifier(), rounds.QuantizationModifier(**_w4a16(symmetric=False))])


METHODS: dict[str, Callable[[Source], Made]] = {
    "none": none,
    "bnb-int8": bnb_int8,
    "bnb-nf4": bnb_nf4,
    "quanto-int8": quanto("qint8", activations=True, calibrated=True),
    "quanto-int4": quanto("qint4", activations=True, calibrated=True),
    "quanto-int8-uncalibrated": quanto("qint8", activations=True, calibrated=False),
    "quanto-int4-uncalibrated": quanto("qint4", activations=True, calibrated=False),
    "quanto-int8-weights": quanto("qint8", activations=False, calibrated=False),
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-int8-activations": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-int4": torchao("Int4WeightOnlyConfig", group_size=GROUP),
    "gptq": gptq,
    "awq": awq,
}


def _w4a16(symmetric: bool) -> dict[str, Any]:
    library = import_module("compressed_tensors.quantization")
    arguments = library.QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=symmetric
    )
    scheme = library.QuantizationScheme(targets=["Linear"], weights=arguments)
    return {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}


def _compressed(source: Source, recipe: list[Any]) -> Made:
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
        size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        return Made(source._replace(directory=Path(directory)).load(), size)


def _made(model: PreTrainedModel) -> Made:
    return Made(model, sum({part.data_ptr(): part.nbytes for part in _parts(model)}.values()))


def _parts(model: PreTrainedModel) -> Iterator[Tensor]:
    """Every plain tensor that the model holds, those inside of tensor subclasses too; shared ones come twice."""

    def flat(tensor: Tensor) -> Iterator[Tensor]:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            for name in names:
                yield from flat(getattr(tensor, name))
        else:
            yield tensor
            state = getattr(tensor, "quant_state", None)  # bitsandbytes keeps a block's scales beside the weight
            for part in (state.absmax, getattr(state.state2, "absmax", None)) if state is not None else ():
                if part is not None:
                    yield part

    for tensor in (*model.parameters(), *model.buffers()):
        yield from flat(tensor)

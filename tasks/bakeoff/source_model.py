"""The model that a method quantizes, with its calibration rows, and the quantized model with its size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.engine.models.model_config import model_class, read_config
from tasks.engine.models.quantized_loading import set_compute_dtype


class QuantizedModel(NamedTuple):
    """A model that runs, and its bytes: in memory, or on disk where the library packs weights only when it saves."""

    model: PreTrainedModel
    bytes: int


class SourceModel(NamedTuple):
    """An unquantized model directory, and the token ids of the rows that methods calibrate on."""

    directory: Path
    dtype: torch.dtype
    device: str
    rows: list[list[int]]

    def load(self, **options: Any) -> PreTrainedModel:
        """The model in `dtype`; `options` go to `from_pretrained`."""
        loader = model_class(read_config(self.directory))
        options = {"dtype": self.dtype, "device_map": {"": self.device}, "local_files_only": True} | options
        model = cast(PreTrainedModel, loader.from_pretrained(self.directory, **options).eval())
        set_compute_dtype(model, self.dtype)  # 4-bit layers multiply as stored on CPUs, too
        return model

    def calibrate(self, model: PreTrainedModel) -> None:
        """Runs the calibration rows through a model."""
        with torch.no_grad():
            for ids in self.rows:
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)

    def on_disk(self, directory: Path) -> QuantizedModel:
        """The quantized model that a library has saved in `directory`, with the size of its safetensors."""
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        return QuantizedModel(self._replace(directory=directory).load(), size)

    @staticmethod
    def in_memory(model: PreTrainedModel) -> QuantizedModel:
        """A quantized model whose tensors are packed in memory; shared tensors count once."""
        return QuantizedModel(model, sum({tensor.data_ptr(): tensor.nbytes for tensor in _tensors(model)}.values()))

    @staticmethod
    def is_linear(module: nn.Module, name: str) -> bool:
        """Whether the module is a linear layer other than the LM head."""
        return isinstance(module, nn.Linear) and not name.endswith("lm_head")

    @staticmethod
    def has_packed_weights(model: PreTrainedModel) -> bool:
        """Whether any parameter is a tensor subclass, as torchao's quantized weights are."""
        return any(hasattr(parameter, "__tensor_flatten__") for parameter in model.parameters())


def _tensors(model: PreTrainedModel) -> Iterator[Tensor]:
    """Every plain tensor of the model, also those inside tensor subclasses; shared ones are repeated."""

    def plain(tensor: Tensor) -> Iterator[Tensor]:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            for name in names:
                yield from plain(getattr(tensor, name))
        else:
            yield tensor
            state = getattr(tensor, "quant_state", None)  # bitsandbytes stores a block's scales beside the weight
            for scales in (state.absmax, getattr(state.state2, "absmax", None)) if state is not None else ():
                if scales is not None:
                    yield scales

    for tensor in (*model.parameters(), *model.buffers()):
        yield from plain(tensor)

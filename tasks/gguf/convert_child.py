"""The child process that reads a model and writes GGUFs, one per JSON line on stdin (tasks.gguf.convert is its parent).

First line in: {"model": DIR, "name": ...} or {"source": GGUF}. First line out: the model's layout.
Then for each file in: {"target": ..., "kind": ..., "types": {name: type}, "quantize": bool, "set": {key: text},
"imatrix": FILE, "text_tokens": [id]}; out: {"done": i, "total": n} after every tensor. An error is {"error": text}, and
ends it.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from tasks.core.errors import StageError
from tasks.core.peak_memory import peak_resident
from tasks.engine.runtimes.ggml import Bytes, init_quantizer, to_type
from tasks.engine.runtimes.ggml_types import TYPES
from tasks.gguf.header import (
    Header,
    TensorInfo,
    pack_text,
    pack_uint32,
    padding,
    read_header,
    with_text_tokens,
    write_header,
)
from tasks.gguf.imatrix import Imatrix, read_imatrix
from tasks.gguf.kinds import KINDS
from tasks.gguf.roles import EMBEDDINGS, layer_order
from tasks.gguf.tensor_values import SourceTensor, StoredRows

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
THREADS = len(os.sched_getaffinity(0))


class ConvertibleModel(Protocol):
    """A model that can be written as a GGUF: metadata values, and tensors with shapes and types."""

    values: dict[str, bytes]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]

    def sources(self, names: Iterable[str]) -> Iterator[SourceTensor]:
        """The tensors with their values, one at a time."""


class GgufModel:
    """A GGUF of 16 or 32 bits as the source of others, without its `stillhouse.*` provenance."""

    def __init__(self, file: Path) -> None:
        header: Header = read_header(file)
        self.values = {key: value for key, value in header.values.items() if not key.startswith("stillhouse.")}
        self.shapes = {tensor.name: tensor.shape for tensor in header.tensors}
        self.types = {tensor.name: tensor.type for tensor in header.tensors}
        self._file, self._tensors = file, {tensor.name: tensor for tensor in header.tensors}

    def sources(self, names: Iterable[str]) -> Iterator[SourceTensor]:
        """The tensors with their values, one at a time."""
        for name in names:
            tensor = self._tensors[name]
            source = SourceTensor(name, tensor.shape, tensor.type, None)
            yield source._replace(stored=StoredRows(self._file, tensor.offset, tensor.type, source.rows))


def write(model: ConvertibleModel, request: dict[str, Any], send: Callable[..., None]) -> None:
    """Writes one file: floats in the converter's order, quantized tensors in that of llama.cpp's quantizer."""
    types: dict[str, str] = request["types"]
    imatrix = read_imatrix(Path(request["imatrix"])) if request.get("imatrix") else None
    names = sorted(types, key=layer_order) if request["quantize"] else list(types)
    values = model.values | {"general.file_type": pack_uint32(KINDS[request["kind"]].id)}
    if request["quantize"]:  # llama.cpp moves these two to the end
        version, kind = "general.quantization_version", "general.file_type"
        moved = {version: pack_uint32(QUANTIZATION_VERSION), kind: values[kind]}
        values = {key: value for key, value in values.items() if key not in moved} | moved
        values |= imatrix.values() if imatrix else {}
    values |= {key: pack_text(text) for key, text in request["set"].items()}
    values = with_text_tokens(values, request.get("text_tokens", ()))
    infos = [TensorInfo(name, model.shapes[name], types[name]) for name in names]
    with Path(request["target"]).open("wb") as file, ThreadPoolExecutor(THREADS) as pool:
        file.write(write_header(values, infos))
        for i, source in enumerate(model.sources(names)):
            for data in _encode(source, types[source.name], imatrix, pool):
                file.write(data.data)
            file.write(padding(infos[i].bytes))
            if i + 1 < len(names):
                send(done=i + 1, total=len(names))
    send(done=len(names), total=len(names), peak_bytes=peak_resident())  # after the file is closed


def _encode(source: SourceTensor, type_: str, imatrix: Imatrix | None, pool: ThreadPoolExecutor) -> Iterator[Bytes]:
    stored = source.as_stored(type_)
    if stored is not None:
        yield from stored
        return
    weights = None
    if imatrix is not None and TYPES[type_].block > 1:
        weights = imatrix.for_tensor(source.name, source.row, source.matrices, source.name in EMBEDDINGS)
    rows_per_matrix = source.rows // source.matrices
    if TYPES[type_].block > 1:
        init_quantizer(type_)

    def encode(piece: tuple[int, int]) -> Bytes:
        rows = source.floats(*piece)
        return to_type(rows, type_, None if weights is None else weights[piece[0] // rows_per_matrix])

    pending: deque[Future[Bytes]] = deque()
    for piece in source.pieces():
        pending.append(pool.submit(encode, piece))
        if len(pending) > 2 * THREADS:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def describe(model: ConvertibleModel) -> dict[str, Any]:
    """The layout that a conversion plan needs (tasks.gguf.conversion_plan.ModelLayout), as JSON."""
    header = Header(model.values, [])
    architecture = header.get("general.architecture")
    heads, kv_heads = (_first(header.get(f"{architecture}.attention.head_count{end}", 1)) for end in ("", "_kv"))
    return {
        "architecture": architecture,
        "layers": int(header.get(f"{architecture}.block_count", 0)),
        "heads_per_kv": heads // kv_heads if kv_heads else 0,
        "values": {key: len(value) for key, value in model.values.items()},
        "tensors": [[name, list(shape), model.types[name]] for name, shape in model.shapes.items()],
    }


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list) else value)


def main() -> None:
    """Answers requests on stdin until it is closed; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        request = json.loads(sys.stdin.readline())
        model: ConvertibleModel
        if "source" in request:
            model = GgufModel(Path(request["source"]))
        else:
            from tasks.gguf.hf_converter import HfModel  # noqa: PLC0415 - imports torch

            model = HfModel(Path(request["model"]), request["name"])
        send(**describe(model))
        for line in sys.stdin:
            write(model, json.loads(line), send)
    except (StageError, ValueError) as error:
        send(error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()

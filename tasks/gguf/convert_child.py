"""The child process that reads a model and writes GGUFs, told what to do by JSON lines (see `tasks.gguf.convert`).

First line in: {"model": DIR, "name": ...} or {"source": GGUF}. First line out: what the tensors are.
Then for each file in: {"target": ..., "kind": ..., "types": {name: type}, "quantize": bool, "set": {key: text},
"imatrix": FILE}; out: {"done": i, "total": n} after every tensor.
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
from tasks.engine.runtimes.ggml import Bytes, prepare, to_type
from tasks.engine.runtimes.ggml_types import TYPES
from tasks.gguf.header import Header, TensorInfo, pack_text, pack_uint32, padding, read_header, write_header
from tasks.gguf.imatrix import Imatrix, read_imatrix
from tasks.gguf.kinds import KINDS
from tasks.gguf.roles import EMBEDDINGS, layer_order
from tasks.gguf.tensor_values import Place, Source

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
THREADS = len(os.sched_getaffinity(0))


class Model(Protocol):
    """What is converted: a model directory through llama.cpp's converter, or a GGUF of 16 or 32 bits."""

    values: dict[str, bytes]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]

    def sources(self, names: Iterable[str]) -> Iterator[Source]:
        """The tensors with their values, one at a time."""


class Existing:
    """A GGUF that is quantized again; its own provenance is left behind."""

    def __init__(self, file: Path) -> None:
        header: Header = read_header(file)
        self.values = {key: value for key, value in header.values.items() if not key.startswith("stillhouse.")}
        self.shapes = {tensor.name: tensor.shape for tensor in header.tensors}
        self.types = {tensor.name: tensor.type for tensor in header.tensors}
        self._file, self._tensors = file, {tensor.name: tensor for tensor in header.tensors}

    def sources(self, names: Iterable[str]) -> Iterator[Source]:
        """The tensors with their values, one at a time."""
        for name in names:
            tensor = self._tensors[name]
            bare = Source(name, tensor.shape, tensor.type, None)
            yield bare._replace(place=Place(self._file, tensor.offset, tensor.type, bare.rows))


def write(model: Model, order: dict[str, Any], say: Callable[..., None]) -> None:
    """Writes one file: the converter's tensors in its order, or quantized in the order of llama.cpp's quantizer."""
    types: dict[str, str] = order["types"]
    imatrix = read_imatrix(Path(order["imatrix"])) if order.get("imatrix") else None
    names = sorted(types, key=layer_order) if order["quantize"] else list(types)
    values = model.values | {"general.file_type": pack_uint32(KINDS[order["kind"]].id)}
    if order["quantize"]:  # llama.cpp takes these two out and puts them at the end
        version, kind = "general.quantization_version", "general.file_type"
        last = {version: pack_uint32(QUANTIZATION_VERSION), kind: values[kind]}
        values = {key: value for key, value in values.items() if key not in last} | last
        values |= imatrix.values() if imatrix else {}
    values |= {key: pack_text(text) for key, text in order["set"].items()}
    infos = [TensorInfo(name, model.shapes[name], types[name]) for name in names]
    with Path(order["target"]).open("wb") as file, ThreadPoolExecutor(THREADS) as pool:
        file.write(write_header(values, infos))
        for i, source in enumerate(model.sources(names)):
            for data in _encoded(source, types[source.name], imatrix, pool):
                file.write(data.data)
            file.write(padding(infos[i].bytes))
            if i + 1 < len(names):
                say(done=i + 1, total=len(names))
    say(done=len(names), total=len(names), peak_bytes=peak_resident())  # when the file is closed


def _encoded(source: Source, type_: str, imatrix: Imatrix | None, pool: ThreadPoolExecutor) -> Iterator[Bytes]:
    stored = source.as_stored(type_)
    if stored is not None:
        yield from stored
        return
    weights = None
    if imatrix is not None and TYPES[type_].block > 1:
        weights = imatrix.of(source.name, source.row, source.matrices, source.name in EMBEDDINGS)
    height = source.rows // source.matrices
    if TYPES[type_].block > 1:
        prepare(type_)

    def encode(piece: tuple[int, int]) -> Bytes:
        rows = source.floats(*piece)
        return to_type(rows, type_, None if weights is None else weights[piece[0] // height])

    waiting: deque[Future[Bytes]] = deque()
    for piece in source.pieces():
        waiting.append(pool.submit(encode, piece))
        if len(waiting) > 2 * THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def described(model: Model) -> dict[str, Any]:
    """What a plan has to know."""
    header = Header(model.values, [])
    architecture = header.get("general.architecture")
    heads, of_kv = (_first(header.get(f"{architecture}.attention.head_count{end}", 1)) for end in ("", "_kv"))
    return {
        "architecture": architecture,
        "layers": int(header.get(f"{architecture}.block_count", 0)),
        "heads_per_kv": heads // of_kv if of_kv else 0,
        "values": {key: len(value) for key, value in model.values.items()},
        "tensors": [[name, list(shape), model.types[name]] for name, shape in model.shapes.items()],
    }


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list) else value)


def main() -> None:
    """Answers lines on stdin until it is closed; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**words: Any) -> None:
        answers.write(json.dumps(words) + "\n")
        answers.flush()

    try:
        first = json.loads(sys.stdin.readline())
        model: Model
        if "source" in first:
            model = Existing(Path(first["source"]))
        else:
            from tasks.gguf.reference import Converted  # noqa: PLC0415 - imports torch

            model = Converted(Path(first["model"]), first["name"])
        say(**described(model))
        for line in sys.stdin:
            write(model, json.loads(line), say)
    except (StageError, ValueError) as error:
        say(error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Reads and writes a GGUF's header (github.com/ggml-org/ggml, docs/gguf.md): metadata and tensor infos.

Metadata values stay bytes: the 262 144 tokens of a vocabulary are copied, never unpacked into Python objects.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.errors import BadConfig
from tasks.engine.runtimes.ggml_types import TYPES, tensor_bytes

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
UINT32, STRING, ARRAY = 4, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TOKEN_TYPES, UNUSED = "tokenizer.ggml.token_type", 5
BY_ID = {type_.id: name for name, type_ in TYPES.items()}


class TensorInfo(NamedTuple):
    """A tensor's entry: `shape` with the row length first, `offset` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return tensor_bytes(self.type, self.shape)


class Header(NamedTuple):
    """Metadata `values` by key, each as the stored bytes of its type (uint32) and value, and the tensors' entries."""

    values: dict[str, bytes]
    tensors: list[TensorInfo]

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python number, string or list."""
        return unpack(self.values[key]) if key in self.values else default


def read_header(file: Path) -> Header:
    """Reads a file's header. Raises BadConfig for a file that is no GGUF of version 3, or is truncated."""
    with file.open("rb") as opened:
        data = opened.read(64 << 20)
        try:
            return _parse(data, file)
        except (struct.error, IndexError):
            data += opened.read()
    try:
        return _parse(data, file)
    except (struct.error, IndexError) as error:
        raise BadConfig(f"{file} is truncated: convert or download it again") from error


def _parse(data: bytes, file: Path) -> Header:
    if data[:4] != MAGIC or struct.unpack_from("<I", data, 4)[0] != VERSION:
        raise BadConfig(f"{file} is no GGUF of version {VERSION}")
    tensors, keys = struct.unpack_from("<QQ", data, 8)
    position, values = 24, {}
    for _ in range(keys):
        key, position = _text(data, position)
        end = _skip(data, position + 4, struct.unpack_from("<I", data, position)[0])
        values[key] = data[position:end]
        position = end
    infos = []
    for _ in range(tensors):
        name, position = _text(data, position)
        (dimensions,) = struct.unpack_from("<I", data, position)
        *shape, type_, offset = struct.unpack_from(f"<{dimensions}QIQ", data, position + 4)
        position += 16 + 8 * dimensions
        if type_ not in BY_ID:
            raise BadConfig(f"{file}: {name} has ggml's type {type_}, which is none of {', '.join(TYPES)}")
        infos.append(TensorInfo(name, tuple(shape), BY_ID[type_], offset))
    alignment = unpack(values["general.alignment"]) if "general.alignment" in values else ALIGNMENT
    start = _padded(position, alignment)
    return Header(values, [tensor._replace(offset=start + tensor.offset) for tensor in infos])


def _text(data: bytes, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, position)
    if position + 8 + length > len(data):
        raise IndexError
    return data[position + 8 : position + 8 + length].decode(), position + 8 + length


def _skip(data: bytes, position: int, type_: int) -> int:
    """The end of the value of `type_` that begins at `position`."""
    if type_ == STRING:
        position += 8 + struct.unpack_from("<Q", data, position)[0]
    elif type_ == ARRAY:
        element_type, count = struct.unpack_from("<IQ", data, position)
        position += 12
        if element_type in SCALARS:
            position += count * struct.calcsize("<" + SCALARS[element_type])
        else:
            for _ in range(count):
                position = _skip(data, position, element_type)
    else:
        position += struct.calcsize("<" + SCALARS[type_])
    if position > len(data):
        raise IndexError
    return position


def unpack(value: bytes) -> Any:
    """A stored value as a Python number, string or list of them."""
    (type_,) = struct.unpack_from("<I", value)
    if type_ == STRING:
        return value[12:].decode()
    if type_ != ARRAY:
        return struct.unpack_from("<" + SCALARS[type_], value, 4)[0]
    element_type, count = struct.unpack_from("<IQ", value, 4)
    if element_type in SCALARS:
        return list(struct.unpack_from(f"<{count}{SCALARS[element_type]}", value, 16))
    if element_type != STRING:
        raise BadConfig("a GGUF with arrays of arrays is not read")
    texts, position = [], 16
    for _ in range(count):
        text, position = _text(value, position)
        texts.append(text)
    return texts


def pack_text(text: str) -> bytes:
    """A string as a stored value."""
    encoded = text.encode()
    return struct.pack("<IQ", STRING, len(encoded)) + encoded


def pack_uint32(number: int) -> bytes:
    """A uint32 as a stored value."""
    return struct.pack("<II", UINT32, number)


def with_text_tokens(values: dict[str, bytes], ids: Sequence[int]) -> dict[str, bytes]:
    """Metadata in which these tokens have the type UNUSED: llama.cpp then reads `<pad>` in a text as text."""
    data = bytearray(values[TOKEN_TYPES]) if ids else bytearray()
    for index in ids:
        struct.pack_into("<i", data, 16 + 4 * index, UNUSED)
    return values | {TOKEN_TYPES: bytes(data)} if ids else values


def write_header(values: dict[str, bytes], tensors: list[TensorInfo]) -> bytes:
    """The bytes before the first tensor, with padding; tensors follow each other in the order of `tensors`."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    for key, value in values.items():
        parts += [struct.pack("<Q", len(key.encode())), key.encode(), value]
    offset = 0
    for tensor in tensors:
        name, shape = tensor.name.encode(), tensor.shape
        head = struct.pack(f"<Q{len(name)}sI{len(shape)}Q", len(name), name, len(shape), *shape)
        parts += [head, struct.pack("<IQ", TYPES[tensor.type].id, offset)]
        offset += _padded(tensor.bytes)
    data = b"".join(parts)
    return data + padding(len(data))


def file_bytes(values: dict[str, int], tensors: list[TensorInfo]) -> int:
    """Size of the file: header, metadata (`values`: sizes by key), tensor infos, and tensors with padding."""
    texts = sum(8 + len(key.encode()) + size for key, size in values.items())
    infos = sum(24 + len(tensor.name.encode()) + 8 * len(tensor.shape) for tensor in tensors)
    return _padded(24 + texts + infos) + sum(_padded(tensor.bytes) for tensor in tensors)


def padding(size: int) -> bytes:
    """Zeros up to the next multiple of the alignment."""
    return bytes(_padded(size) - size)


def _padded(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment

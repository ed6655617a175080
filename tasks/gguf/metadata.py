"""Provenance in a GGUF's own metadata, so that the file alone says where it came from."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from tasks.core.provenance import commit, libraries
from tasks.gguf import GgufConfig


class Found(NamedTuple):
    """A tensor as the file has it; `shape` with the row length first."""

    type: str
    shape: list[int]
    bytes: int


def origin(config: GgufConfig, model: Path, dataset: Path) -> dict[str, str]:
    """The `stillhouse.*` values: config, commit, libraries, and what the inputs say of themselves, as JSON."""
    values: dict[str, Any] = {
        "stillhouse.config": config.model_dump(mode="json"),
        "stillhouse.libraries": libraries(),
        "stillhouse.inputs": {"model": model.name, "dataset": dataset.name},
        "stillhouse.model": _provenance(model),
        "stillhouse.dataset": _provenance(dataset),
    }
    written = {key: json.dumps(value, sort_keys=True) for key, value in values.items() if value is not None}
    return {"stillhouse.commit": commit(), **written}


def stamp(source: Path, target: Path, values: dict[str, str]) -> dict[str, Found]:
    """Copies `source` with `values` added to its metadata, tensors byte for byte; returns what they are."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, architecture, endianess=reader.endianess)
    if alignment := reader.get_field(gguf.Keys.General.ALIGNMENT):
        writer.data_alignment = alignment.contents()
    for field in reader.fields.values():
        own = field.name in values or field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF.")
        if not own:
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for key, text in values.items():
        writer.add_string(key, text)
    for tensor in reader.tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
    return {
        tensor.name: Found(tensor.tensor_type.name, tensor.shape.tolist(), int(tensor.n_bytes))
        for tensor in reader.tensors
    }


def read_origin(file: Path) -> dict[str, str]:
    """The `stillhouse.*` values of a GGUF."""
    fields = gguf.GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("stillhouse.")}


def _provenance(directory: Path) -> dict[str, Any] | None:
    """What the stage that made `directory` wrote of itself and, inside, of its inputs: the whole lineage."""
    file = directory / "provenance.json"
    return json.loads(file.read_text()) if file.is_file() else None

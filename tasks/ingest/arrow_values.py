"""Values of Arrow columns as JSON has them: structs without nulls that Arrow adds, ISO 8601 dates, exact decimals."""

import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pyarrow
from pyarrow import types

from tasks.ingest.exact_json import Number, load

Convert = Callable[[Any], Any]


def column_values(batch: pyarrow.RecordBatch, index: int) -> list[Any]:
    """The column's values, row by row."""
    column, field = batch.column(index), batch.schema.field(index)
    values = column.to_pylist()
    if _is_json(batch.schema, field):
        return [None if value is None else _parsed(value) for value in values]
    convert = _converter(field.type)
    return values if convert is None else [None if value is None else convert(value) for value in values]


def _is_json(schema: pyarrow.Schema, field: pyarrow.Field) -> bool:
    """Whether `datasets` keeps JSON values in this column of strings, by the features in the file's metadata."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        is_json = info["info"]["features"][field.name]["_type"] == "Json"
    except (ValueError, KeyError, TypeError):
        return False
    return bool(is_json and (types.is_string(field.type) or types.is_large_string(field.type)))


def _converter(kind: pyarrow.DataType) -> Convert | None:
    """What turns a value of this type into JSON's; None where it is one already."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _parsed if kind.extension_name == "arrow.json" else _converter(kind.storage_type)
    if types.is_struct(kind):
        return _struct_converter({field.name: _converter(field.type) for field in kind})
    if types.is_map(kind):
        item = _converter(kind.item_type)
        return lambda pairs: {str(name): _converted(item, value) for name, value in pairs if value is not None}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _converter(kind.value_type)
        return item and (lambda values: [_converted(item, value) for value in values])
    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if types.is_temporal(kind):
        return _iso
    return _number if types.is_decimal(kind) else None


def _struct_converter(fields: dict[str, Convert | None]) -> Convert:
    def convert(value: dict[str, Any]) -> dict[str, Any]:
        return {name: _converted(fields[name], item) for name, item in value.items() if item is not None}

    return convert


def _converted(convert: Convert | None, value: Any) -> Any:
    return value if convert is None or value is None else convert(value)


def _parsed(text: str) -> Any:
    """A JSON value; text that is none stays text."""
    try:
        return load(text.encode())
    except ValueError:
        return text


def _number(value: Decimal) -> Number:
    return Number(str(value))


def _iso(value: Any) -> str:
    """ISO 8601; a duration in seconds."""
    if isinstance(value, datetime.timedelta):
        return f"PT{value.total_seconds():f}".rstrip("0").rstrip(".") + "S"
    return str(value.isoformat())

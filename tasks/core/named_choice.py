"""A config field whose accepted values are the names in a registry, in the form and in the reference as well.

METHODS: dict[str, Method] = {}
method: Annotated[str, NameIn(METHODS)] = "none"
format: Annotated[str, NameIn(SHAPES, "auto")] = "auto"      # a name beside those of the registry
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


class NameIn:
    """Refuses names that are neither in `registry` nor among `extra_names`; the JSON schema lists the accepted ones.

    The registry is read when a value is checked or a schema is made, so that what is registered later counts.
    """

    def __init__(self, registry: Mapping[str, Any], *extra_names: str) -> None:
        self.registry = registry
        self._extra_names = extra_names

    @property
    def names(self) -> list[str]:
        """The accepted names, those beside the registry first."""
        return [*self._extra_names, *self.registry]

    def check(self, name: str) -> str:
        """The name itself. Raises ValueError for an unknown one, with the nearest known name."""
        if name not in self.names:
            nearest = get_close_matches(name, self.names, 1)
            suggestion = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"there is no {name!r}, only {', '.join(self.names)}{suggestion}")
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "enum": self.names}

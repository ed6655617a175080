"""Settings of a divergence, made from the registry: which one, and every parameter that one of them has."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, create_model

from tasks.core.config import MoreThan, OnlyWith, StageConfig
from tasks.engine.losses.divergence import Divergence
from tasks.engine.losses.divergence_registry import DEFAULT, DIVERGENCES, parameter_settings

DISTILLED = OnlyWith("kd_weight", MoreThan(0))
Config = TypeVar("Config", bound=StageConfig)


def _with_registered_fields(config: type[Config]) -> type[Config]:
    """The config with the registry's names as choices of `divergence`, and a field for each parameter."""
    choices: Any = Literal.__getitem__(tuple(DIVERGENCES))
    titles = "; ".join(f"`{divergence.name}`: {divergence.title}" for divergence in DIVERGENCES.values())
    about = f"How far the student's distribution is from the teacher's. {titles}. Formulas are in docs/distillation.md."
    fields: dict[str, Any] = {"divergence": (Annotated[choices, DISTILLED], Field(DEFAULT, description=about))}
    for setting, parameter in parameter_settings(DIVERGENCES).items():
        condition = OnlyWith("divergence", tuple(d.name for d in DIVERGENCES.values() if _has(d, setting)))
        bounds: dict[str, Any] = dict(parameter.bounds)
        fields[setting] = (
            Annotated[float, condition], Field(parameter.default, description=parameter.help, **bounds)
        )  # fmt: skip
    return create_model(config.__name__, __base__=config, __module__=config.__module__, **fields)


def _has(divergence: Divergence, setting: str) -> bool:
    return any(parameter.setting == setting for parameter in divergence.parameters.values())


@_with_registered_fields
class DivergenceConfig(StageConfig):
    """The divergence of a distillation loss and its parameters."""

    divergence: str = DEFAULT
    """A name in the registry."""

    @property
    def divergence_parameters(self) -> dict[str, float]:
        """The chosen divergence's parameters by setting."""
        parameters = DIVERGENCES[self.divergence].parameters.values()
        return {parameter.setting: getattr(self, parameter.setting) for parameter in parameters}

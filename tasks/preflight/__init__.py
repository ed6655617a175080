"""Preflight: what can be known before a run trains, from its settings, its first rows and the models' small files."""

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from tasks.core.training_config import TrainingConfig

State = Literal["ok", "warn", "fail"]


class Check(NamedTuple):
    """One thing that was checked: `fail` stops the run, with the remedy."""

    name: str
    state: State
    result: str
    remedy: str = ""


class Training(BaseModel):
    """A training run to plan memory for: its model by name, its method and the settings that all trainings have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: Literal["lora", "qlora", "full"]
    settings: TrainingConfig
    processes: int = 1
    teacher_online: bool = False
    teacher_precision: str = "auto"


class PreflightConfig(BaseModel):
    """What the command checks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Path | None = None
    """File of training rows, whose first ones are looked at."""
    format: str = "auto"
    system_prompt: str | None = None
    ignore_fields: list[str] = []
    max_length: int = 2048
    over_long: str = "drop"
    chat_template: Literal["model", "gemma"] = "model"
    same_tokenizer: bool = False
    """Whether all models have to share one tokenizer, as a teacher and its student do."""
    card_gib: float | None = None
    """Memory of the smallest card; None without one."""
    trainings: dict[str, Training] = {}
    libraries: tuple[str, ...] = ()
    """Modules that the run's stages import."""

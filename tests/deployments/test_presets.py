"""The presets are what the configs say: complete, commented, loadable."""

from pathlib import Path

import pytest

from deployments.write_presets import FLOWS, PRESETS, PRESETS_DIR, text
from flows.config import PipelineConfig


@pytest.mark.parametrize("name", PRESETS)
def test_the_committed_preset_is_the_generated_one(name: str) -> None:
    path = PRESETS_DIR / f"{name}.yaml"
    assert path.read_text() == text(name), "run python -m deployments.write_presets"
    config_class = FLOWS[name][1] if name in FLOWS else PipelineConfig
    assert config_class.load(path) == config_class.model_validate(PRESETS[name][1])


def test_no_preset_is_forgotten() -> None:
    assert {path.stem for path in PRESETS_DIR.glob("*.yaml")} == set(PRESETS)


def test_the_quickstart_needs_nothing_from_outside() -> None:
    config = PipelineConfig.load(PRESETS_DIR / "quickstart.yaml")
    root = Path(__file__).parents[2]
    for path in (config.train, config.test, config.teacher_base, config.student_base):
        assert (root / str(path)).exists(), path

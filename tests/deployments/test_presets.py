"""The presets are short, loadable and consistent with the rest of the house."""

from pathlib import Path

import pytest
import yaml

from flows.checks import idle
from flows.config import PipelineConfig
from flows.presets import preset_names, preset_text
from flows.reference import FLOWS, PAGE, page

ROOT = Path(__file__).parents[2]
PRESETS_DIR = ROOT / "deployments" / "presets"


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_only_what_differs_from_the_defaults(name: str) -> None:
    config_class = FLOWS.get(name, FLOWS["pipeline"])[1]
    config = config_class.load(PRESETS_DIR / f"{name}.yaml")
    assert not idle(config)
    settings = yaml.safe_load(preset_text(name))
    settings.pop("preset", None)
    for key, value in settings.items():
        below = config_class.default(key) if not config_class.model_fields[key].is_required() else object()
        if isinstance(value, dict) and key in config_class.groups():
            assert [inner for inner, set_to in value.items() if getattr(below, inner) == set_to] == []
        else:
            assert value != below


def test_a_preset_starts_with_what_it_is_for() -> None:
    assert all(preset_text(name).startswith("# ") for name in preset_names())
    assert len(preset_names()) == 12


def test_the_quickstart_needs_nothing_from_outside() -> None:
    config = PipelineConfig.load(PRESETS_DIR / "quickstart.yaml")
    for path in (config.train, config.test, config.text, config.teacher_base, config.student_base):
        assert (ROOT / str(path)).exists(), path


def test_the_reference_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run stillhouse reference"

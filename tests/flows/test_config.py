"""The flow's parameter and its import."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from flows.config import PipelineConfig

NEEDED = {"train": "t.jsonl", "teacher_base": "a", "student_base": "b"}


def test_unknown_and_wrong_settings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="temprature"):
        PipelineConfig.model_validate({**NEEDED, "student": {"temprature": 2}})
    (tmp_path / "my.yaml").write_text("train: t.jsonl\nteacher_base: a\nstudent_base: b\nteacher:\n  rank: 0\n")
    with pytest.raises(ValueError, match=r"teacher\.rank"):
        PipelineConfig.load(tmp_path / "my.yaml")
    (tmp_path / "not.yaml").write_text("train: [")
    with pytest.raises(ValueError, match="not YAML"):
        PipelineConfig.load(tmp_path / "not.yaml")


def test_a_gguf_kind_stands_once() -> None:
    with pytest.raises(ValidationError, match="names a kind twice: Q8_0, Q8_0"):
        PipelineConfig.model_validate({**NEEDED, "gguf": [{"kind": "Q8_0"}, {"kind": "Q8_0"}]})


def test_the_direct_run_trains_as_the_student_does() -> None:
    config = PipelineConfig.model_validate({**NEEDED, "student": {"method": "lora", "rank": 7, "max_steps": 3}})
    assert (config.direct_config.rank, config.direct_config.max_steps) == (7, 3)
    assert config.direct_config.method == "lora"


def test_every_field_has_help_for_the_form() -> None:
    schema = PipelineConfig.model_json_schema()
    described = [schema, *schema["$defs"].values()]
    missing = [
        f"{model['title']}.{name}"
        for model in described
        for name, field in model.get("properties", {}).items()
        if "description" not in field and "$ref" not in field
    ]
    assert not missing


@pytest.mark.parametrize("flow", ["pipeline", "audit", "quantize", "bakeoff", "ablation"])
def test_a_group_of_the_form_is_called_by_its_setting_and_says_what_it_is_for(flow: str) -> None:
    """As Prefect's form merges them: what stands at the setting goes before what its class says."""
    form = parameter_schema(getattr(import_module(f"flows.{flow}"), flow).fn).definitions
    [config] = [one for one in form.values() if "ingest" in one["properties"]]
    groups = {name: field for name, field in config["properties"].items() if "$ref" in field}
    assert "ingest" in groups
    for name, field in groups.items():
        shown = form[field["$ref"].removeprefix("#/definitions/")] | field
        assert shown["title"] == name.title()
        assert len(shown["description"]) > 30 and not shown["description"].startswith("Settings of")


def test_importing_the_flows_loads_no_torch() -> None:
    heavy = ["torch", "transformers", "datasets", "peft", "numpy", "mlflow.pyfunc", "matplotlib"]
    flows = "flows.pipeline, flows.audit, flows.quantize, flows.bakeoff, flows.ablation"
    code = f"import {flows}, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_file_of_the_students_grid_must_not_be_rounded_otherwise() -> None:
    on_grid = {**NEEDED, "student": {"grid": "Q4_0"}}
    with pytest.raises(ValidationError, match="imatrix: false"):
        PipelineConfig.model_validate({**on_grid, "gguf": [{"kind": "Q4_0"}]})
    exact = {"kind": "Q4_0", "imatrix": False, "embedding_type": "Q8_0"}
    assert PipelineConfig.model_validate({**on_grid, "gguf": [exact, {"kind": "Q8_0"}]}).gguf[0].imatrix is False

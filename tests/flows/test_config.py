"""The flow's parameter and its import."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from flows.config import PipelineConfig
from flows.flow_config import FlowConfig
from tasks.core.config import run_wide

NEEDED = {"train": "t.jsonl", "teacher_base": "a", "student_base": "b"}


def test_unknown_and_wrong_settings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="temprature"):
        PipelineConfig.model_validate({**NEEDED, "student": {"temprature": 2}})
    (tmp_path / "my.yaml").write_text("train: t.jsonl\nteacher_base: a\nstudent_base: b\nteacher:\n  rank: 0\n")
    with pytest.raises(ValueError, match=r"teacher\.rank"):
        PipelineConfig.load(tmp_path / "my.yaml")
    with pytest.raises(ValueError, match="max_length") as refused:
        PipelineConfig.checked({**NEEDED, "max_length": 3}, "my.yaml")
    assert str(refused.value).count("max_length") == 1, "once, not for every stage that it is handed to"
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


FLOWS = {"pipeline": NEEDED, "ablation": NEEDED, "audit": {"models": {"a": "b"}},
         "quantize": {"model": "m", "train": "t"},
         "bakeoff": {"model": "m", "train": "t"}}  # fmt: skip
"""Each flow with the least it needs."""


def config_of(flow: str) -> type[FlowConfig]:
    return get_type_hints(getattr(import_module(f"flows.{flow}"), flow).fn)["config"]


def form_of(flow: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flow's fields and the form's definitions, as Prefect has them."""
    definitions = parameter_schema(getattr(import_module(f"flows.{flow}"), flow).fn).definitions
    [fields] = [schema["properties"] for schema in definitions.values() if "ingest" in schema["properties"]]
    return fields, definitions


@pytest.mark.parametrize("flow", FLOWS)
def test_every_field_has_help_for_the_form(flow: str) -> None:
    _, definitions = form_of(flow)
    missing = [
        f"{model['title']}.{name}"
        for model in definitions.values()
        for name, field in model.get("properties", {}).items()
        if "description" not in field
    ]
    assert not missing


@pytest.mark.parametrize("flow", FLOWS)
def test_a_group_of_the_form_is_closed_and_called_by_its_setting(flow: str) -> None:
    fields, definitions = form_of(flow)
    groups = config_of(flow).groups()
    assert "ingest" in groups and list(fields)[-len(groups) :] == list(groups), "groups come last"
    for name in groups:
        assert fields[name]["default"] is None and fields[name]["anyOf"][1] == {"type": "null"}
        assert fields[name]["title"] == name.title() and len(fields[name]["description"]) > 30
        inside = definitions[fields[name]["anyOf"][0]["$ref"].removeprefix("#/definitions/")]["properties"]
        assert not inside.keys() & FlowConfig.model_fields, "what all stages share stands at the top"
        for key, value in config_of(flow).default(name).model_dump(mode="json", exclude_unset=True).items():
            assert inside[key]["default"] == value, "an opened group shows this flow's defaults"


def test_the_form_asks_first_for_what_has_to_be_filled_in() -> None:
    fields, _ = form_of("pipeline")
    assert list(fields)[:6] == ["train", "validation", "test", "teacher_base", "student_base", "gguf"]
    assert fields["gguf"]["default"] == ["BF16", "Q8_0", "Q4_0", "Q4_K_M"]


@pytest.mark.parametrize("flow", FLOWS)
def test_run_wide_settings_reach_every_stage_and_are_refused_inside_one(flow: str) -> None:
    config_class, needed = config_of(flow), FLOWS[flow]
    config = config_class.model_validate({**needed, "max_length": 77, "out_of_scope_intent": "other"})
    kinds = {**config_class.groups(), **config_class.lists()}
    for name, kind in kinds.items():
        values = getattr(config, name)
        for group in values if isinstance(values, list) else [values]:
            assert getattr(group, "max_length", 77) == 77 and getattr(group, "out_of_scope_intent", "other") == "other"
        for key in run_wide(kind):
            inside: Any = {key: getattr(config, key)}
            if name in config_class.lists():
                inside = [{**config_class.default(name)[0].model_dump(exclude_unset=True), **inside}]
            with pytest.raises(ValidationError, match=f"{name}.{key}: set {key} at the top"):
                config_class.model_validate({**needed, name: inside})
    again = config.model_dump(mode="json")
    assert config_class.model_validate(again) == config and "max_length" not in again["ingest"]


def test_an_untouched_group_of_the_form_is_the_flows_default() -> None:
    config = config_of("ablation").model_validate({**NEEDED, "teacher": None, "student": {"rank": 3}})
    assert config == config_of("ablation").model_validate({**NEEDED, "student": {"rank": 3, "method": "lora"}})
    assert config.student.learning_rate == 2e-4, "and one that is touched starts from it"


def test_a_preset_is_merged_setting_by_setting() -> None:
    settings = {"train": "my.jsonl", "preset": "gemma-3-qat-24gb", "student": {"rank": 9}, "gguf": ["Q8_0"]}
    config = PipelineConfig.model_validate(settings)
    assert config.teacher_base == "google/gemma-3-1b-it-qat-q4_0-unquantized" and config.train == "my.jsonl"
    assert (config.student.rank, config.student.micro_batch_size, config.student.loss_chunk_mib) == (9, 32, 1024)
    assert [item.kind for item in config.gguf] == ["Q8_0"]
    with pytest.raises(ValidationError, match="there is no 'gemma'; there are"):
        PipelineConfig.model_validate({**NEEDED, "preset": "gemma"})


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

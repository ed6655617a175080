"""Settings without effect are named, contradictions are refused, before anything runs."""

from typing import Any

import pytest
from pydantic import ValidationError

from flows.audit import AuditConfig
from flows.checks import ACROSS, idle
from flows.config import PipelineConfig
from flows.quantize import QuantizeConfig
from tasks.core.config import conditions
from tasks.distill import DistillConfig
from tasks.teacher import FineTuneConfig

NEEDED = {"train": "t.jsonl", "teacher_base": "a", "student_base": "b"}


@pytest.mark.parametrize(
    ("settings", "setting", "reason"),
    [
        ({"student": {"rank": 8}}, "student.rank", "method is full, and it needs method: lora or qlora"),
        ({"teacher": {"method": "full", "use_dora": True}}, "teacher.use_dora", "method is full"),
        ({"teacher": {"epochs": 3, "max_steps": 10}}, "teacher.epochs", "max_steps is 10"),
        ({"ingest": {"near_threshold": 0.9}}, "ingest.near_threshold", "near_duplicates is off"),
        ({"student": {"jsd_beta": 0.2}}, "student.jsd_beta", "divergence is forward_kl"),
        ({"student": {"on_policy_share": 0.5}}, "student.on_policy_share", "on_policy_rounds above 0"),
        ({"merge": {"rescale_k": 0.5}}, "merge.rescale_k", "remedy is none"),
        ({"gguf": [{"kind": "Q4_0", "budget_mb": 9, "sensitive_percent": 1}]}, "gguf Q4_0.sensitive_percent", "budget"),
        ({"validation": "v", "ingest": {"validation_fraction": 0.2}}, "ingest.validation_fraction", "validation is v"),
        ({"evaluate": {"text_tokens": 9}}, "evaluate.text_tokens", "text is not given; set text"),
        ({"vocabulary_text": "v.txt"}, "vocabulary_text", "student.vocabulary is not given"),
    ],
)
def test_a_setting_without_effect_is_named_with_the_reason(settings: dict[str, Any], setting: str, reason: str) -> None:
    [warning] = idle(PipelineConfig.model_validate({**NEEDED, **settings}))
    assert warning.startswith(f"{setting} has no effect: ") and reason in warning


def test_defaults_and_settings_that_work_are_not_warned_of() -> None:
    assert not idle(PipelineConfig.model_validate(NEEDED))
    working = {
        "teacher": {"rank": 8, "epochs": 3}, 
        "student": {"method": "lora", "rank": 8, "divergence": "jsd", "jsd_beta": 0.3},
        "ingest": {"near_duplicates": "drop", "near_threshold": 0.9}, "text": "t.txt", "evaluate": {"text_tokens": 9},
    }  # fmt: skip
    assert not idle(PipelineConfig.model_validate({**NEEDED, **working}))


def test_a_group_that_does_not_run_is_idle_as_a_whole() -> None:
    [warning] = idle(QuantizeConfig.model_validate({"model": "m", "train": "t", "merge": {"gate_rows": 3}}))
    assert warning == "merge.gate_rows has no effect: merge.remedy is none; set it to rescale or clip"
    [warning] = idle(AuditConfig.model_validate({"models": {"a": "b"}, "ingest": {"seed": 3}}))
    assert warning.startswith("ingest.seed has no effect: no rows are given")


@pytest.mark.parametrize("config", [FineTuneConfig, DistillConfig, *PipelineConfig.groups().values()])
def test_conditions_name_fields_and_values_that_exist(config: Any) -> None:
    for field in config.model_fields.values():
        assert all(mark.field in config.model_fields for mark in conditions(field))


def test_rules_across_groups_name_fields_that_exist() -> None:
    for rule in ACROSS:
        for path in (rule.setting, rule.other):
            group, _, key = path.rpartition(".")
            fields = PipelineConfig.groups()[group].model_fields if group else PipelineConfig.model_fields
            assert key in fields


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test": "t.jsonl"}, "test: t.jsonl is also train"),
        ({"revision": {"c": "main"}}, "'c' is none of this run's models"),
        ({"gate": {"check": "metric"}}, "set evaluate.metric"),
        ({"student": {"kd_weight": 0, "ce_weight": 0}}, "nothing is learnt"),
        ({"teacher": {"fp8": True, "method": "qlora"}}, "fp8=true is for method=lora"),
        ({"teacher": {"batch_size": 10, "processes": 4}}, "cannot be split over processes=4"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PipelineConfig.model_validate({**NEEDED, **settings})


def test_a_gate_rule_about_models_that_are_not_evaluated_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"gate\.student_points: this flow evaluates no teacher"):
        QuantizeConfig.model_validate({"model": "m", "train": "t", "gate": {"student_points": 3}})

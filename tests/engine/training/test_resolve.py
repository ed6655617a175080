"""A config resolved once: what changes, why, and where it is said."""

import json

import pytest

from tasks.core.command import Report
from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.chat_template import Example
from tasks.engine.training.resolve import resolve
from tests.pico import pico_model


@pytest.fixture
def base(tmp_path):
    return ModelDir(pico_model(tmp_path / "base", hidden=32))


ROWS = [Example(list(range(20)), [-100] * 10 + list(range(10)))] * 16


def resolved(base, tmp_path, level=0, method="full", required=None, lossless_only=False, **settings):
    """The resolution, the report that it fills, and the log."""
    report, job = Report(), Job(tmp_path / "work", memory_level=level)
    config = TrainingConfig(batch_size=8, micro_batch_size=4, **settings)
    resolution = resolve(
        config, method, base, ROWS, tmp_path, job, report, required=required, lossless_only=lossless_only
    )
    events = map(json.loads, (tmp_path / "work" / "events.jsonl").read_text().splitlines())
    return resolution, report, [event["message"] for event in events if event["event"] == "log"]


def test_every_change_is_in_one_block_of_the_log_and_in_the_report_with_its_reason(base, tmp_path):
    required = {"cuda_graphs": ("off", "the stage says so")}
    resolution, report, log = resolved(base, tmp_path, level=2, memory_gib=4, required=required)
    config = resolution.config
    assert (config.precision, config.micro_batch_size, config.cuda_graphs) == ("float32", 1, "off")
    block = next(text for text in log if text.startswith("settings that this run does not use as configured:"))
    lines = block.splitlines()[1:]
    assert lines[0].startswith("  precision: auto -> float32 (")
    assert any("micro_batch_size: 2 -> 1 (memory fallback level 2: micro-batch 2 -> 1" in line for line in lines)
    assert "  cuda_graphs: auto -> off (the stage says so)" in lines
    assert [change["field"] for change in report.details["settings"]] == [line.split(":")[0].strip() for line in lines]
    assert report.details["memory_plan"]["predicted_gib"] >= 0


def test_a_config_that_is_used_as_it_is_says_nothing(base, tmp_path):
    resolution, report, log = resolved(base, tmp_path, precision="float32", memory_gib="off")
    assert not resolution.changes and "settings" not in report.details
    assert not any("does not use as configured" in text for text in log)


def test_levels_that_change_the_model_are_refused_where_the_stage_keeps_it(base, tmp_path):
    lossy = dict(allow_quality_loss=True, memory_gib="off", precision="float32", max_length=64)
    resolution, _, _ = resolved(base, tmp_path, level=5, **lossy)
    assert resolution.config.max_length == 32
    with pytest.raises(BadConfig, match="last of 4 memory fallback levels"):
        resolved(base, tmp_path, level=5, lossless_only=True, **lossy)

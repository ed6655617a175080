"""The command `stillhouse`: quick help, overrides, the first config, and its twins `python -m flows...`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows import init
from flows.cards import Card
from flows.cli import stage_names
from flows.config import PipelineConfig
from flows.start import read_config

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "deployments" / "quickstart"
L4 = Card("NVIDIA L4", 22.5)


def stillhouse(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "flows.cli", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_comes_without_the_libraries_of_the_runs() -> None:
    code = "import flows.cli, sys; print([m for m in ('torch', 'prefect', 'mlflow', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    shown = stillhouse("--help").stdout
    for command in ("run", "init", "doctor", "fetch", "compare", "audit", "quantize", "bakeoff", "ablation", "stage"):
        assert f"  {command} " in shown


def test_settings_are_changed_on_the_command_line() -> None:
    config = read_config(PipelineConfig, "quickstart", ["student.rank=8", "gguf=[Q8_0]", "max_length=99"])
    assert (config.student.rank, config.student.alpha, config.teacher.max_length) == (8, 64, 99)
    assert [item.kind for item in config.gguf] == ["Q8_0"]
    with pytest.raises(ValueError, match="write it as setting=value"):
        read_config(PipelineConfig, "quickstart", ["rank"])
    with pytest.raises(ValueError, match="neither a file nor a preset"):
        read_config(PipelineConfig, "nothing.yaml")


def test_a_directory_does_not_hide_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_config(PipelineConfig, "quickstart").preset == "quickstart"
    with pytest.raises(ValueError, match="--set text=.*is not YAML"):
        read_config(PipelineConfig, "quickstart", ["text=["])


def test_what_is_wrong_is_said_in_a_line() -> None:
    done = stillhouse("run", "quickstart", "--set", "teacher.rnak=3")
    assert done.returncode == 1 and "teacher.rnak" in done.stderr and "Traceback" not in done.stderr
    done = stillhouse("stage", "distil")
    assert done.returncode == 1 and "there are bakeoff, distill, distill.teacher_cache" in done.stderr


def test_a_stage_runs_alone(tmp_path: Path) -> None:
    assert {"teacher", "distill", "gguf", "preflight"} <= set(stage_names())
    assert "--evaluations" in stillhouse("stage", "gate", "--help").stdout


def test_the_first_config_is_short_and_fits_data_and_card(tmp_path: Path) -> None:
    rows = init.describe_rows(str(QUICKSTART / "data"))
    assert rows.number == 1900 and rows.test == str(QUICKSTART / "data" / "test.jsonl")
    text = init.write_config(rows, L4, None, None, "my.yaml")
    assert len(text.splitlines()) <= 12 and "1,900 rows" in text and "NVIDIA L4, 22 GiB" in text
    config = PipelineConfig.checked(yaml.safe_load(text), "my.yaml")
    assert config.preset == "gemma-3-24gb" and config.validation == str(QUICKSTART / "data" / "validation.jsonl")
    assert config.max_length >= 108, "the longest row in the quickstart's small vocabulary"
    assert [item.kind for item in config.gguf] == ["Q8_0", "Q4_K_M"]


@pytest.mark.parametrize(
    ("card", "base", "preset"),
    [
        (Card("T4", 14.6), None, "gemma-3-16gb"),
        (L4, "google/gemma-3n-E2B-it", "gemma-3n-24gb"),
        (Card("H100", 79.2), None, "gemma-3-80gb"),
        (None, None, "gemma-3-24gb"),
    ],
)
def test_the_preset_is_the_cards(card: Card | None, base: str | None, preset: str) -> None:
    assert init.pick_preset(card, (base, None)) == preset


def test_a_first_config_names_local_bases_and_few_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b" * 900}) + "\n")
    bases = str(QUICKSTART / "teacher"), str(QUICKSTART / "student")
    text = init.write_config(init.describe_rows(str(tmp_path / "rows.jsonl")), None, *bases, "my.yaml")
    config = PipelineConfig.checked(yaml.safe_load(text), "my.yaml")
    assert (config.teacher_base, config.student_base) == bases and config.ingest.allow_few_rows
    assert config.test is None and config.validation is None and config.max_length == 512
    with pytest.raises(ValueError, match="is not there"):
        init.describe_rows(str(tmp_path / "none.jsonl"))


def test_a_config_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "my.yaml"
    init.main(str(QUICKSTART / "data"), out, None, None, force=False)
    out.write_text("mine")
    with pytest.raises(SystemExit, match="--force to overwrite"):
        init.main(str(QUICKSTART / "data"), out, None, None, force=False)
    assert out.read_text() == "mine"
    init.main(str(QUICKSTART / "data"), out, None, None, force=True)
    assert out.read_text() != "mine"


@pytest.mark.parametrize("name", ["notes.txt", "empty.jsonl", "folder"])
def test_init_refuses_what_holds_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("no rows")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="holds no rows"):
        init.describe_rows(str(tmp_path / name))


def test_init_takes_a_dataset_that_lies_elsewhere() -> None:
    assert init.describe_rows("hub:owner/name") == ("hub:owner/name", None, None, 0, 0)

"""Each process of torchrun's sees one GPU, chosen before the stage's modules are imported; imports choose nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core.errors import BadConfig

VARIABLES = {"CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "LOCAL_RANK", "RANK", "TORCHELASTIC_RUN_ID"}
PROBE = "import os, sys; print(os.environ.get('CUDA_VISIBLE_DEVICES'), sys.argv[1:])"
SELECTIONS = [
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "1"),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "3,GPU-5"}, "GPU-5"),
    ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "GPU-5"}, "GPU-5"),  # chosen by the parent
    ({"WORLD_SIZE": "1", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "3,5"}, "3,5"),
    ({}, "None"),
]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without what torchrun sets, and with `variables`."""
    return {name: os.environ[name] for name in os.environ.keys() - VARIABLES} | variables


@pytest.mark.parametrize("variables, visible", SELECTIONS)
def test_a_rank_process_chooses_its_gpu_before_it_imports_the_stage(
    variables: dict[str, str], visible: str, tmp_path: Path
) -> None:
    (tmp_path / "visible_at_import.py").write_text(PROBE)
    command = [sys.executable, "-m", "tasks.core.rank_process", "visible_at_import", "config.json"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(command, env=environment(**variables, PYTHONPATH=path), capture_output=True, text=True)
    assert process.stdout == f"{visible} ['config.json']\n", process.stderr


@pytest.mark.parametrize("variables, visible", SELECTIONS)
def test_a_stage_that_torchrun_started_itself_restarts_on_its_gpu(
    variables: dict[str, str], visible: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"act": "environment"}))
    arguments = [str(tmp_path / "config.json"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    subprocess.run([sys.executable, "-m", "tests.core.probe", *arguments], env=environment(**variables), check=True)
    initial_environment = json.loads((tmp_path / "work" / "environment.json").read_text())
    assert str(initial_environment.get("CUDA_VISIBLE_DEVICES")) == visible


@pytest.mark.parametrize("module", ["tasks", "flows.pipeline"])
def test_an_import_leaves_the_environment_unchanged(module: str) -> None:
    code = f"import os; before = dict(os.environ); import {module}; print(dict(os.environ) == before)"
    variables = {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=True)
    assert process.stdout == "True\n"


def test_fewer_gpus_than_processes_are_refused_before_torchrun_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tasks.core.launch", "2", "tests.core.probe"]
    process = subprocess.run(command, env=environment(CUDA_VISIBLE_DEVICES="3"), capture_output=True, text=True)
    assert process.returncode == BadConfig.exit_code
    assert process.stderr.startswith("2 processes, and CUDA_VISIBLE_DEVICES=3 names 1: set processes to")

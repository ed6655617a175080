"""Killed children, a killed run: what was done is kept, what was running goes on, nothing is left behind."""

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.flows.pico_run import Home
from tests.prefect_server import PrefectServer

SEEN_MODULES = {"ingest", "teacher", "states", "distill", "outliers", "merge", "gguf", "evaluate", "gate"}


def stages(pid: int) -> list[psutil.Process]:
    """The stage commands below a process: they call themselves `stage:<folder>`."""
    try:
        return [child for child in psutil.Process(pid).children(recursive=True) if child.name().startswith("stage:")]
    except psutil.NoSuchProcess:
        return []


def test_a_child_killed_in_every_stage_is_tried_again(tmp_path: Path, prefect_server: PrefectServer) -> None:
    home = Home(tmp_path, prefect_server, direct=False)
    run, killed = home.start(), set[str]()
    deadline = time.monotonic() + 900
    while run.poll() is None and time.monotonic() < deadline:
        for child in stages(run.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                stage = child.name().removeprefix("stage:")
                if stage not in killed:
                    child.kill()
                    killed.add(stage)
        time.sleep(0.02)
    assert run.returncode == 0, home.output[-6000:]
    assert killed == SEEN_MODULES
    assert home.output.count("was ended by SIGKILL") >= len(killed)
    client = MlflowClient(f"sqlite:///{tmp_path}/home/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    names = [found.info.run_name for found in runs]
    assert len(names) == len(set(names)), "a retry continues its run"
    assert {found.info.status for found in runs} == {"FINISHED"}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_stopped_in_training_leaves_no_orphan_and_goes_on_where_it_was(
    sign: signal.Signals, tmp_path: Path, prefect_server: PrefectServer
) -> None:
    longer = {"max_steps": 200, "batch_size": 8, "micro_batch_size": 8, "rank": 4, "save_every_steps": 5}
    home = Home(tmp_path, prefect_server, teacher=longer, direct=False)
    run = home.start()
    checkpoints = tmp_path / "home" / "scratch"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("teacher-*/work/checkpoints/*/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    family = psutil.Process(run.pid).children(recursive=True)
    os.kill(run.pid, sign)
    run.wait(timeout=60)
    gone, alive = psutil.wait_procs(family, timeout=40)
    assert not alive, [process.cmdline() for process in alive]

    if sign == signal.SIGKILL:  # nobody could say goodbye: the next run does
        output = home.run()
        assert "goes on from" in output, output[-4000:]
        assert home.cached["ingest"]
    client = MlflowClient(f"sqlite:///{tmp_path}/home/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    statuses = sorted({found.info.status for found in runs})
    assert statuses == ["FINISHED", "KILLED"], statuses

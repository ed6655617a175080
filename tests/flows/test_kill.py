"""Killed children, a killed run: what was done is kept, what was running goes on, nothing is left behind."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.flows.pico_run import Home
from tests.prefect_server import PrefectServer

SEEN_MODULES = {"ingest", "teacher", "distill", "outliers", "merge", "gguf", "evaluate"}


def stage_of(process: psutil.Process) -> str | None:
    """`teacher` for `python -m tasks.teacher.run`; None for any other process."""
    try:
        command = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None
    found = [part.split(".")[1] for part in command if part.startswith("tasks.") and part.endswith(".run")]
    return found[0] if found else None


def children(pid: int) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(pid).children(recursive=True) if stage_of(child)]
    except psutil.NoSuchProcess:
        return []


def test_a_child_killed_in_every_stage_is_tried_again(tmp_path: Path, prefect_server: PrefectServer) -> None:
    home = Home(tmp_path, prefect_server)
    run, killed, log = home.start(), set[str](), (tmp_path / "output.txt").open("w")
    assert run.stdout is not None
    os.set_blocking(run.stdout.fileno(), False)
    deadline = time.monotonic() + 900
    while run.poll() is None and time.monotonic() < deadline:
        log.write(run.stdout.read() or "")
        for child in children(run.pid):
            stage = stage_of(child)
            if stage and stage not in killed and time.time() - child.create_time() > 1.5:
                child.kill()
                killed.add(stage)
        time.sleep(0.05)
    log.write(run.stdout.read() or "")
    log.close()
    assert run.returncode == 0, (tmp_path / "output.txt").read_text()[-6000:]
    assert killed == SEEN_MODULES
    assert (tmp_path / "output.txt").read_text().count("SIGKILL") >= len(killed)
    client = MlflowClient(f"sqlite:///{tmp_path}/home/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    names = [found.info.run_name for found in runs]
    assert len(names) == len(set(names)), "a retry continues its run"
    assert {found.info.status for found in runs} == {"FINISHED"}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_killed_in_training_goes_on_where_it_was(
    sign: signal.Signals, tmp_path: Path, prefect_server: PrefectServer
) -> None:
    longer = {"max_steps": 400, "batch_size": 8, "micro_batch_size": 8, "rank": 4, "save_every_steps": 10}
    home = Home(tmp_path, prefect_server, teacher=longer)
    run = home.start()
    checkpoints = tmp_path / "home" / "scratch"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("teacher-*/work/checkpoints/*/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    family = psutil.Process(run.pid).children(recursive=True)
    os.kill(run.pid, sign)
    run.communicate(timeout=60)
    gone, alive = psutil.wait_procs(family, timeout=40)
    assert not alive, [process.cmdline() for process in alive]

    output = home.run()
    assert "goes on from" in output, output[-4000:]
    assert home.cached["ingest"]
    client = MlflowClient(f"sqlite:///{tmp_path}/home/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert sorted({found.info.status for found in runs}) == ["FINISHED", "KILLED"]

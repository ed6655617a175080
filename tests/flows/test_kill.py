"""Killed children, a killed run: what was done is kept, what was running goes on, nothing is left behind."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from tests.flows.pico_run import TRAINING, Home
from tests.prefect_server import PrefectServer
from tests.waiting import wait_until

# Folders of the stages; a process's name is cut to 15 characters, "stage:teacher_c".
SEEN_MODULES = {"ingest", "teacher", "teacher_c", "distill", "outliers", "merge", "gguf", "evaluate", "gate"}
# Long enough to be stopped in the teacher's training, and little to do afterwards.
SETTINGS: dict[str, Any] = {
    "teacher": {**TRAINING, "max_steps": 60, "save_every_steps": 5, "batch_size": 2, "micro_batch_size": 2},
    "direct": False,
    "outliers": {"calibration_rows": 2, "measure": "none", "sample_values": 4096},
    "gguf": [{"kind": "Q8_0", "proof_rows": 2, "min_top1": 0.5}],
    "evaluate": {"max_new_tokens": 4, "limit_rows": 2, "latency_rows": 0, "perplexity_rows": 0},
}


def stages(pid: int) -> list[psutil.Process]:
    """The stage commands below a process: they call themselves `stage:<folder>`."""
    try:
        return [child for child in psutil.Process(pid).children(recursive=True) if child.name().startswith("stage:")]
    except psutil.NoSuchProcess:
        return []


def kill_one_of_each(run: "subprocess.Popen[bytes]", wanted: set[str], killed: set[str]) -> None:
    """Kills the first command of each wanted stage that is seen now, and notes it in `killed`."""
    for child in stages(run.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            stage = child.name().removeprefix("stage:")
            if stage in wanted - killed:
                child.kill()
                killed.add(stage)


def stop_in_training(home: Home, sign: signal.Signals, killed: set[str]) -> None:
    """Starts the run, kills its first ingest, and stops it when the teacher has a checkpoint; no process is left."""
    run = home.start()
    scratch = home.directory / "home" / "scratch"

    def has_checkpoint() -> bool:
        kill_one_of_each(run, {"ingest"}, killed)
        return run.poll() is not None or any(scratch.glob("teacher-*/work/checkpoints/*/*"))

    wait_until(has_checkpoint, 300)
    family = psutil.Process(run.pid).children(recursive=True)
    assert [child.name() for child in stages(run.pid)] == ["stage:teacher"], home.output[-3000:]
    os.kill(run.pid, sign)
    run.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=40)
    assert not alive, [process.cmdline() for process in alive]


def mlflow_runs(home: Home) -> list[Any]:
    client = MlflowClient(f"sqlite:///{home.directory}/home/mlflow.db")
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def test_a_killed_run_goes_on_where_it_was_though_a_child_of_every_stage_is_killed(
    tmp_path: Path, prefect_server: PrefectServer
) -> None:
    home, killed = Home(tmp_path, prefect_server, **SETTINGS), set[str]()
    stop_in_training(home, signal.SIGKILL, killed)
    assert "was ended by SIGKILL" in home.output
    before = {found.info.run_id for found in mlflow_runs(home)}

    home.environment["STILLHOUSE_GPU_SLOT"] += "-again"  # a dead run's slot stays taken for its lease of 60 s
    run = home.start()

    def has_ended() -> bool:
        kill_one_of_each(run, SEEN_MODULES, killed)
        return run.poll() is not None

    wait_until(has_ended, 500)
    assert run.returncode == 0, home.output[-6000:]
    assert killed == SEEN_MODULES
    assert home.output.count("was ended by SIGKILL") >= len(killed) - 1
    assert "resumes from" in home.output
    assert home.cached["ingest"] and not home.cached["teacher"]
    statuses = {found.info.run_id: found.info.status for found in mlflow_runs(home)}
    assert {statuses[one] for one in before} == {"FINISHED", "KILLED"}, "the dead run's are reaped by the next one"
    assert {status for one, status in statuses.items() if one not in before} == {"FINISHED"}
    names = [found.info.run_name for found in mlflow_runs(home) if found.info.run_id not in before]
    assert len(names) == len(set(names)), "a retry continues its run"


def test_a_run_that_is_told_to_stop_leaves_no_orphan_and_says_so(tmp_path: Path, prefect_server: PrefectServer) -> None:
    home = Home(tmp_path, prefect_server, **SETTINGS)
    stop_in_training(home, signal.SIGTERM, {"ingest"})
    assert {found.info.status for found in mlflow_runs(home)} == {"FINISHED", "KILLED"}

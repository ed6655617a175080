"""MLflow on a real SQLite store: one run a flow run, nested stage runs, truthful ends, nothing lost when it is down."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.core.errors import GateFailed, Preempted
from tasks.core.mlflow_connection import without_password
from tasks.core.settings import Settings
from tasks.core.tracking import PROCESS, STAGE, Tracker
from tests.mlflow_database import put_empty_database


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("STILLHOUSE_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_empty_database(tmp_path)
    return Settings()


def open_tracker(settings: Settings, flow_run: str = "flow-1") -> Tracker:
    def fail(message: str) -> None:
        raise AssertionError(message)

    return Tracker(flow_run, "brave-otter", settings, fail)


def test_runs_end_truthfully_and_a_retry_continues_the_same_run(settings: Settings) -> None:
    client = MlflowClient(settings.tracking_uri)
    tracker = open_tracker(settings)
    parent = tracker.flow()
    with pytest.raises(GateFailed), tracker.stage("teacher") as run:
        run.metrics(1, {"loss": 2.0})
        raise GateFailed("too bad")
    failed = client.get_run(run.run_id)
    assert failed.info.status == "FAILED" and "too bad" in failed.data.tags["error"]
    assert failed.data.tags["mlflow.parentRunId"] == parent.run_id

    with pytest.raises(Preempted), tracker.stage("teacher") as retried:
        raise Preempted("stopped")
    assert retried.run_id == run.run_id and client.get_run(run.run_id).info.status == "KILLED"
    with pytest.raises(KeyboardInterrupt), tracker.stage("teacher"):
        raise KeyboardInterrupt
    assert client.get_run(run.run_id).info.status == "KILLED"

    with tracker.stage("teacher") as third:
        third.params({"rank": 8})
        third.metrics(2, {"loss": 1.0})
    finished = client.get_run(run.run_id)
    assert third.run_id == run.run_id and finished.info.status == "FINISHED"
    assert [point.value for point in client.get_metric_history(run.run_id, "loss")] == [2.0, 1.0]
    assert finished.data.params == {"rank": "8"}


def test_another_process_finds_the_same_runs(settings: Settings) -> None:
    first, second = open_tracker(settings), open_tracker(settings)
    assert first.flow().run_id == second.flow().run_id
    assert open_tracker(settings, "flow-2").flow().run_id != first.flow().run_id


def test_runs_of_killed_processes_are_ended(settings: Settings) -> None:
    client = MlflowClient(settings.tracking_uri)
    tracker = open_tracker(settings)
    dead, alive = tracker.flow(), open_tracker(settings, "flow-2").flow()
    host, pid, _ = client.get_run(str(dead.run_id)).data.tags[PROCESS].split(":")
    client.set_tag(str(dead.run_id), PROCESS, f"{host}:{pid}:1")  # the same pid, started in 1970: another process
    tracker.end_dead_runs()
    assert client.get_run(str(dead.run_id)).info.status == "KILLED"
    assert client.get_run(str(alive.run_id)).info.status == "RUNNING"


def test_a_gguf_is_registered_once(settings: Settings) -> None:
    tracker = open_tracker(settings)
    with tracker.stage("gguf") as run:
        for _ in range(2):
            run.register("stillhouse-student", "file:///store/blob", "a" * 64)
        run.register("stillhouse-student", "file:///store/other", "b" * 64)
    versions = MlflowClient(settings.tracking_uri).search_model_versions("name = 'stillhouse-student'")
    assert sorted(version.tags["sha256"] for version in versions) == ["a" * 64, "b" * 64]


def test_datasets_and_artifacts(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with open_tracker(settings).stage("ingest") as run:
        run.dataset("dataset", "c" * 64, "file:///store", {"train_rows": 3})
        run.artifacts(tmp_path / "report.json")
    client = MlflowClient(settings.tracking_uri)
    [dataset] = client.get_run(run.run_id).inputs.dataset_inputs
    assert {tag.key: tag.value for tag in dataset.tags}["sha256"] == "c" * 64
    assert json.loads(dataset.dataset.profile) == {"train_rows": 3}
    assert [item.path for item in client.list_artifacts(run.run_id)] == ["report.json"]
    assert client.get_run(run.run_id).data.tags[STAGE] == "ingest"


def test_a_missing_server_gives_one_warning_and_does_not_stop_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings: list[str] = []
    tracker = Tracker("flow-1", "brave-otter", Settings(), warnings.append)
    with tracker.stage("teacher") as run:
        run.params({"rank": 8})
        run.metrics(1, {"loss": 2.0})
    assert run.run_id is None and tracker.link(run) is None
    assert len(warnings) == 1 and "the run goes on without it" in warnings[0]


def test_what_mlflow_refuses_is_all_that_is_lost(settings: Settings) -> None:
    warnings: list[str] = []
    tracker = Tracker("flow-1", "brave-otter", settings, warnings.append)
    with tracker.stage("teacher") as run:
        run.params({"rank": 8})
        run.params({"rank": 16})
        run.metrics(1, {"loss": 2.0})
    assert len(warnings) == 1 and "refused" in warnings[0] and "rank" in warnings[0]
    recorded = MlflowClient(settings.tracking_uri).get_run(str(run.run_id))
    assert (recorded.data.params, recorded.data.metrics, recorded.info.status) == (
        {"rank": "8"},
        {"loss": 2.0},
        "FINISHED",
    )


@pytest.mark.parametrize(
    "uri", ["postgresql://joe:hunter2@127.0.0.1:9/mlflow", "http://joe:hunter2@127.0.0.1:9", "sqlite:////proc/x/m.db"]
)
def test_a_database_or_server_out_of_reach_does_not_stop_the_run_and_no_password_is_logged(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings: list[str] = []
    with Tracker("flow-1", "brave-otter", Settings(), warnings.append).stage("teacher") as run:
        run.metrics(1, {"loss": 2.0})
    assert run.run_id is None and len(warnings) == 1
    assert "the run goes on without it" in warnings[0] and "hunter2" not in warnings[0]


def test_a_link_has_no_password() -> None:
    assert without_password("https://joe:hunter2@mlflow.example.org/x") == "https://mlflow.example.org/x"
    assert without_password("see http://a/b@c and s3://bucket/key") == "see http://a/b@c and s3://bucket/key"

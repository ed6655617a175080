"""The whole pipeline for real: a Prefect server, child processes, the store, MLflow, llama.cpp."""

import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

from tests.flows.pico_run import Home
from tests.prefect_server import PrefectServer

MODELS = ["teacher-base", "student-base", "teacher", "direct", "student", "merged", "Q8_0"]
FIELDS = {
    "name", "stage", "format", "bytes", "json_valid", "intent_accuracy", "exact_match", "out_of_scope_recall",
    "tokens_per_second",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_server: PrefectServer) -> Home:
    """A run that went through."""
    home = Home(tmp_path_factory.mktemp("pipeline"), prefect_server)
    output = home.run()
    assert "make prefect-ui" not in output and "/runs/flow-run/" in output  # a server is running: its page is named
    return home


def test_the_summary_keeps_its_contract(home: Home) -> None:
    summary = home.summary
    assert [row["name"] for row in summary["models"]] == MODELS
    assert all(set(row) == FIELDS for row in summary["models"])
    stages = [row["stage"] for row in summary["models"]]
    assert stages == ["base", "base", "teacher", "direct", "student", "merged", "gguf"]
    assert [row["format"] for row in summary["models"][-2:]] == ["bfloat16", "Q8_0"]
    assert all(0 <= row["json_valid"] <= 1 and row["bytes"] > 1000 for row in summary["models"])
    assert all(row["tokens_per_second"] > 0 for row in summary["models"])
    assert summary["dataset"]["test_rows"] == 12
    assert list(summary["artifacts"]) == ["teacher", "student", "merged", "Q8_0"]
    assert not any(stage["cached"] for stage in summary["stages"] if not stage["name"].startswith("take"))
    page = (home.directory / "home/reports/latest/index.html").read_text()
    assert "<h2" in page and page.count("<svg") >= 2 and page.count("<img") >= 2


def test_mlflow_holds_one_run_and_a_nested_run_a_stage(home: Home) -> None:
    client = MlflowClient(f"sqlite:///{home.directory}/home/mlflow.db")
    parent = client.get_run(home.summary["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["prefect.flow_run_id"] == home.summary["flow_run_id"]
    assert parent.data.params["teacher.rank"] == "4"
    [experiment] = [found for found in client.search_experiments() if found.name == "stillhouse"]
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    stages = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id], query)}
    assert {"ingest", "teacher", "teacher-cache", "student", "direct", "outliers", "merge", "gguf Q8_0", "gate"} <= set(
        stages
    )
    assert all(run.info.status == "FINISHED" for run in stages.values())
    losses = client.get_metric_history(stages["teacher"].info.run_id, "loss")
    assert [point.step for point in losses] == [1, 2, 3, 4]
    student = stages["student"].data.metrics
    assert {"kd_loss", "ce_loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(student)
    assert stages["student"].inputs.dataset_inputs[0].dataset.name == "dataset"
    sampled = [run for run in stages.values() if any(name.startswith("system/") for name in run.data.metrics)]
    assert sampled, "no stage ran for the 5 s that MLflow takes to sample the machine"
    [version] = client.search_model_versions("name = 'stillhouse-gguf-Q8_0'")
    assert Path(version.source.removeprefix("file://")).is_file()


def test_prefect_shows_tables_links_and_progress(home: Home, prefect_server: PrefectServer) -> None:
    found = httpx.post(f"{prefect_server.url}/artifacts/filter", json={"limit": 200}).json()
    mine = [artifact for artifact in found if artifact["flow_run_id"] == home.summary["flow_run_id"]]
    assert {"preflight", "models", "report", "report-page", "verdict", "dataset-profile", "mlflow-run"} <= {
        artifact["key"] for artifact in mine
    }
    assert any(artifact["type"] == "progress" and artifact["data"] == 100.0 for artifact in mine)


def test_a_second_run_makes_only_what_was_deleted_and_goes_on_without_mlflow(home: Home) -> None:
    first = home.summary
    store = home.directory / "home" / "store"
    blobs = [path for path in (store / "blobs").rglob("*") if path.is_file() and path.read_bytes()[:4] == b"GGUF"]
    max(blobs, key=lambda path: path.stat().st_size).unlink()  # the largest: an importance matrix is a GGUF too
    shutil.rmtree(home.directory / "home" / "inputs")
    home.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    home.environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    output = home.run()
    assert "the run goes on without it" in output and home.summary["mlflow_run_id"] is None
    made = [name for name, cached in home.cached.items() if not cached and not name.startswith("import")]
    assert made == ["gguf Q8_0"], "the same file again: what was measured of it still holds"
    assert [row["exact_match"] for row in home.summary["models"]] == [row["exact_match"] for row in first["models"]]


def test_a_change_runs_what_depends_on_it_and_a_broken_rule_fails_after_the_report(home: Home) -> None:
    """In an MLflow that has seen nothing of what is cached: the run records that too."""
    fresh = f"sqlite:///{home.directory}/other.db"
    home.environment["MLFLOW_TRACKING_URI"] = fresh
    home.write(
        evaluate={"max_new_tokens": 4, "latency_rows": 0, "perplexity_rows": 0},
        gate={"floors": {"exact_match": 1.0, "rouge_l": 0.5}},
    )
    output = home.fail()
    del home.environment["MLFLOW_TRACKING_URI"]
    again = {name for name, cached in home.cached.items() if not cached and not name.startswith("import")}
    assert again == {"gate", *(f"evaluate {name}" for name in MODELS)}
    assert "exact_match" in output and "at least 100.0% is wanted" in output
    assert home.summary["gate"]["passed"] is False
    page = (home.directory / "home/reports/latest/index.html").read_text()
    assert "at least 100.0% is wanted" in page and "cannot be judged: no row of student has rouge_l" in page

    client = MlflowClient(fresh)
    [experiment] = [found for found in client.search_experiments() if found.name == "stillhouse"]
    [teacher] = client.search_runs([experiment.experiment_id], "attributes.run_name = 'teacher'")
    assert [point.step for point in client.get_metric_history(teacher.info.run_id, "loss")] == [1, 2, 3, 4]


def test_errors_say_what_where_and_the_remedy(tmp_path: Path, prefect_server: PrefectServer) -> None:
    """A setting, the flow's own tasks, and a stage's command: what each says is the last that the terminal shows."""
    row = '{"instruction": "Préparer", "output": "{}"}\n'
    (tmp_path / "latin.jsonl").write_bytes(row.encode() + row.encode("latin-1") * 60)
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "name": ({"learning_rat": 1}, "learning_rat: there is no such setting"),
        "missing": ({"train": str(tmp_path / "missing.jsonl")}, "missing.jsonl; paths are relative to"),
        "latin": ({"train": str(tmp_path / "latin.jsonl")}, "60 x not UTF-8"),
    }
    runs = []
    for name, (changes, said) in wrong.items():
        (tmp_path / name).mkdir()
        home = Home(tmp_path / name, prefect_server, **changes)
        runs.append((home, home.start(), said))  # side by side: most of each is its start
    for home, run, said in runs:
        assert run.wait(timeout=300) != 0, home.output[-3000:]
        assert said in home.output[home.output.rindex("stillhouse: ") :], home.output[-3000:]
    latin = runs[-1][0]  # its bad rows lie on the machine that ran the stage: MLflow shows them
    [quarantine] = (latin.directory / "home" / "mlartifacts").rglob("report/quarantine.jsonl")
    assert len(quarantine.read_text().splitlines()) == 60 and "are in MLflow: " in latin.output

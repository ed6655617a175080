"""The other orders of the same stages, for real: audit, quantize, bake-off, ablation, on the quickstart's bases."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from mlflow import MlflowClient

from flows.ablation import ARMS, PAIRS
from flows.fetch import artifacts, fetch
from tasks.core.errors import BadConfig
from tasks.core.settings import Settings
from tests.flows.pico_run import QUICKSTART, ROOT, TRAINING, Home
from tests.prefect_server import PrefectServer

TEACHER, STUDENT = str(QUICKSTART / "teacher"), str(QUICKSTART / "student")
OUTLIERS = {"calibration_rows": 8, "measured_rows": 4, "sample_values": 4096}
EVALUATE = {"max_new_tokens": 16, "latency_rows": 0, "perplexity_rows": 0}
FEW = {"max_new_tokens": 6, "latency_rows": 0, "perplexity_rows": 4, "limit_rows": 6}
LOOSE = {"proof_rows": 4, "min_top1": 0.5, "max_mean_kl": 5.0}
METHODS = [{"method": method, "dtype": "float32", "rows": 4} for method in ("none", "quanto-int8")]
CONFIGS: dict[str, dict[str, Any]] = {
    "audit": {"models": {"teacher": TEACHER, "student": STUDENT}, "outliers": OUTLIERS},
    "quantize": {
        "model": STUDENT, "outliers": OUTLIERS, "evaluate": EVALUATE, "gate": {"gguf_points": 100},
        "gguf": [{"kind": kind, **LOOSE} for kind in ("Q8_0", "Q4_0")],
    },
    "bakeoff": {
        "model": STUDENT, "outliers": OUTLIERS, "evaluate": EVALUATE, "methods": METHODS,
        "gguf": [{"kind": "Q8_0", **LOOSE}],
    },
    "ablation": {
        "teacher_base": TEACHER, "student_base": STUDENT, "evaluate": FEW, "clip_percentile": 60,
        "teacher": TRAINING, "student": {**TRAINING, "method": "lora", "learning_rate": 1e-3},
    },
}  # fmt: skip


class Ran(NamedTuple):
    """What each flow returned, what it said, and where MLflow is."""

    summaries: Mapping[str, dict[str, Any]]
    said: Mapping[str, str]
    mlflow: str

    def report(self, flow: str) -> Path:
        """The directory of its report."""
        return Path(self.summaries[flow]["report"])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, prefect_server: PrefectServer) -> Ran:
    """All four in one process, on 120 rows to calibrate on and 12 held out."""
    directory = tmp_path_factory.mktemp("flows")
    home = Home(directory, prefect_server)
    rows = {split: str(directory / f"{split}.jsonl") for split in ("train", "test")}
    paths = {flow: directory / f"{flow}.yaml" for flow in CONFIGS}
    for flow, path in paths.items():
        path.write_text(yaml.safe_dump({**rows, **CONFIGS[flow]}))
    command = [sys.executable, "-m", "tests.flows.in_one_process", *map(str, paths.values())]
    done = subprocess.run(
        command, cwd=ROOT, env=home.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:]
    said = {part.split("\n", 1)[0]: part for part in done.stdout.split("=== ")}
    summaries = {flow: json.loads(path.with_suffix(".json").read_text()) for flow, path in paths.items()}
    return Ran(summaries, said, f"sqlite:///{directory}/home/mlflow.db")


def artifact(server: PrefectServer, key: str, flow_run_id: str) -> list[dict[str, Any]]:
    """A Prefect table of a flow run."""
    query = {"limit": 200, "artifacts": {"key": {"any_": [key]}, "flow_run_id": {"any_": [flow_run_id]}}}
    [found] = httpx.post(f"{server.url}/artifacts/filter", json=query).json()
    rows: list[dict[str, Any]] = json.loads(found["data"])
    return rows


def test_an_audit_gives_a_verdict_for_every_model_and_target(ran: Ran, prefect_server: PrefectServer) -> None:
    assert "Safe to deploy?" in ran.said["audit"] and "gguf_cpu" in ran.said["audit"]
    rows = artifact(prefect_server, "verdict", ran.summaries["audit"]["flow_run_id"])
    assert {(row["model"], row["target"]) for row in rows} >= {("teacher", "bf16"), ("student", "fp16")}
    assert all(row["verdict"] in ("safe", "risky", "unsafe", "unknown") and row["because"] for row in rows)
    assert (ran.report("audit") / "outliers.md").is_file() and list(ran.report("audit").glob("*.png"))


def test_any_model_becomes_proven_files(ran: Ran) -> None:
    summary = ran.summaries["quantize"]
    assert [row["name"] for row in summary["models"]] == ["model", "Q8_0", "Q4_0"]
    assert summary["gate"]["passed"] and summary["gate"]["rules"] == 2
    sizes = [row["bytes"] for row in summary["models"]]
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_file_is_fetched_out_of_the_store(ran: Ran, tmp_path: Path) -> None:
    settings, run = Settings(home=ran.report("quantize").parents[1]), str(ran.report("quantize"))
    assert artifacts(run, settings).keys() == {"Q8_0", "Q4_0"}
    fetch(run, "Q4_0", tmp_path / "out", settings)
    assert (tmp_path / "out" / "model.gguf").stat().st_size == ran.summaries["quantize"]["models"][2]["bytes"]
    assert (tmp_path / "out" / "serve.sh").is_file() and [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(BadConfig, match="out is there already"):
        fetch(run, "Q8_0", tmp_path / "out", settings)
    with pytest.raises(BadConfig, match="made no 'Q5_0'; it made Q8_0, Q4_0"):
        fetch(run, "Q5_0", tmp_path / "new", settings)


def test_a_bake_off_joins_libraries_and_files_in_one_table(ran: Ran) -> None:
    rows = {row["method"]: row for row in json.loads((ran.report("bakeoff") / "bakeoff.json").read_text())}
    assert set(rows) == {"none", "quanto-int8", "GGUF Q8_0, imatrix unused"}
    assert rows["none"]["mean_kl"] < 1e-6 and rows["none"]["predicted"] == "safe"
    assert "skipped" in rows["quanto-int8"] or rows["quanto-int8"]["mean_kl"] > 0  # the library is no dependency
    file = rows["GGUF Q8_0, imatrix unused"]
    assert file["bytes"] < rows["none"]["bytes"] and "tokens_per_second" not in file, "no row was asked alone"
    stage = next(one for one in ran.summaries["quantize"]["stages"] if one["name"] == "gguf Q8_0")
    assert 0 < file["seconds"] < stage["seconds"], "the conversion's own, without the proof"
    assert "happened" in ran.said["bakeoff"]
    assert (ran.report("bakeoff") / "bakeoff.png").stat().st_size > 10_000
    cached = {stage["name"]: stage["cached"] for stage in ran.summaries["bakeoff"]["stages"]}
    assert cached["outliers"] and cached["gguf Q8_0 imatrix"], "another flow made them"
    assert not cached["bake none float32"]


def test_an_ablation_compares_four_students_pair_by_pair(ran: Ran, prefect_server: PrefectServer) -> None:
    assert "What each step changes" in ran.said["ablation"]
    summary = ran.summaries["ablation"]
    names = [row["name"] for row in summary["models"]]
    assert names == ["student-base", "teacher", "teacher clipped", "SFT", "KD", "SFT NF4", "KD clipped",
                     "SFT as NF4", "KD as NF4", "SFT NF4 as NF4"]  # fmt: skip
    assert {(one["from"], one["to"]) for one in summary["comparisons"]} == set(PAIRS.values())
    perplexities = [summary["evaluations"][name]["held_out_perplexity"] for name in names]
    assert len(set(perplexities)) == len(names), "every arm is a model of its own"
    formats = {row["name"]: row["format"] for row in summary["models"]}
    assert formats["KD"] == "bfloat16" and formats["KD as NF4"] == "nf4" and not summary["skipped"]
    rows = artifact(prefect_server, "ablation", summary["flow_run_id"])
    assert len(rows) == len(summary["comparisons"]) and {"difference", "95 % interval", "p"} <= rows[0].keys()
    page = (ran.report("ablation") / "index.html").read_text()
    assert "What each step changes" in page and all(f"<h3>{arm}</h3>" in page for arm in ARMS)  # their losses
    client = MlflowClient(ran.mlflow)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()], max_results=1000)
    assert {*ARMS, "teacher-cache for KD", "teacher-cache for KD clipped"} <= {one.info.run_name for one in runs}

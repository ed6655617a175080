"""The other orders of the same stages, for real: audit, quantize, bake-off, ablation, on the quickstart's bases."""

import json
from pathlib import Path
from typing import Any

import httpx
from mlflow import MlflowClient

from flows.ablation import ARMS, PAIRS
from tests.flows.pico_run import QUICKSTART, TRAINING, Home
from tests.prefect_server import PrefectServer

OUTLIERS = {"calibration_rows": 8, "measured_rows": 4, "sample_values": 4096}
EVALUATE = {"max_new_tokens": 16, "latency_rows": 0, "perplexity_rows": 0}


def home(directory: Path, server: PrefectServer, flow: str, **settings: Any) -> Home:
    """A flow's home with 120 rows to calibrate on and 12 held out."""
    rows = {split: str(directory / f"{split}.jsonl") for split in ("train", "test")}
    return Home(directory, server, flow, **rows, outliers=OUTLIERS, **settings)


def artifacts(server: PrefectServer, key: str) -> list[dict[str, Any]]:
    """Prefect's artifacts of a key, newest last."""
    found = httpx.post(f"{server.url}/artifacts/filter", json={"limit": 200}).json()
    return sorted((one for one in found if one["key"] == key), key=lambda one: one["created"])


def report(run: Home) -> Path:
    """The one report that a home's run wrote."""
    [directory] = (path for path in (run.directory / "home" / "reports").iterdir() if not path.is_symlink())
    return directory


def test_an_audit_gives_a_verdict_for_every_model_and_target(tmp_path: Path, prefect_server: PrefectServer) -> None:
    models = {"teacher": str(QUICKSTART / "teacher"), "student": str(QUICKSTART / "student")}
    run = home(tmp_path, prefect_server, "audit", models=models)
    output = run.run()
    assert "Safe to deploy?" in output and "gguf_cpu" in output
    rows = json.loads(artifacts(prefect_server, "verdict")[-1]["data"])
    assert {(row["model"], row["target"]) for row in rows} >= {("teacher", "bf16"), ("student", "fp16")}
    assert all(row["verdict"] in ("safe", "risky", "unsafe", "unknown") and row["because"] for row in rows)
    assert (report(run) / "outliers.md").is_file() and list(report(run).glob("*.png"))


def test_any_model_becomes_proven_files(tmp_path: Path, prefect_server: PrefectServer) -> None:
    files = [{"kind": kind, "proof_rows": 4, "min_top1": 0.5, "max_mean_kl": 5.0} for kind in ("Q8_0", "Q4_0")]
    run = home(
        tmp_path, prefect_server, "quantize",
        model=str(QUICKSTART / "student"), gguf=files, evaluate=EVALUATE, gate={"gguf_points": 100},
    )  # fmt: skip
    run.run()
    assert [row["name"] for row in run.summary["models"]] == ["model", "Q8_0", "Q4_0"]
    assert run.summary["gate"]["passed"] and run.summary["gate"]["rules"] == 2
    sizes = [row["bytes"] for row in run.summary["models"]]
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_bake_off_joins_libraries_and_files_in_one_table(tmp_path: Path, prefect_server: PrefectServer) -> None:
    methods = [{"method": method, "dtype": "float32", "rows": 4} for method in ("none", "quanto-int8")]
    run = home(
        tmp_path, prefect_server, "bakeoff", model=str(QUICKSTART / "student"), methods=methods, evaluate=EVALUATE,
        gguf=[{"kind": "Q8_0", "proof_rows": 4, "max_mean_kl": 1e9, "min_top1": 0}],
    )  # fmt: skip
    output = run.run()
    rows = {row["method"]: row for row in json.loads((report(run) / "bakeoff.json").read_text())}
    assert set(rows) == {"none", "quanto-int8", "GGUF Q8_0 + imatrix"}
    assert rows["none"]["mean_kl"] < 1e-6 and rows["none"]["predicted"] == "safe"
    assert "skipped" in rows["quanto-int8"] or rows["quanto-int8"]["mean_kl"] > 0  # the library is no dependency
    assert rows["GGUF Q8_0 + imatrix"]["bytes"] < rows["none"]["bytes"]
    assert "happened" in output and (report(run) / "bakeoff.png").stat().st_size > 10_000


def test_an_ablation_compares_four_students_pair_by_pair(tmp_path: Path, prefect_server: PrefectServer) -> None:
    few = {"max_new_tokens": 6, "latency_rows": 0, "perplexity_rows": 4, "limit_rows": 6}
    run = Home(
        tmp_path, prefect_server, "ablation", train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"),
        teacher_base=str(QUICKSTART / "teacher"), student_base=str(QUICKSTART / "student"), evaluate=few,
        teacher=TRAINING, student={**TRAINING, "method": "lora", "learning_rate": 1e-3}, clip_percentile=60,
    )  # fmt: skip
    output = run.run()
    assert "What each step changes" in output
    summary = run.summary
    names = [row["name"] for row in summary["models"]]
    assert names == ["student-base", "teacher", "teacher clipped", "SFT", "KD", "SFT NF4", "KD clipped",
                     "SFT as NF4", "KD as NF4", "SFT NF4 as NF4"]  # fmt: skip
    assert {(one["from"], one["to"]) for one in summary["comparisons"]} == set(PAIRS.values())
    perplexities = [summary["evaluations"][name]["held_out_perplexity"] for name in names]
    assert len(set(perplexities)) == len(names), "every arm is a model of its own"
    formats = {row["name"]: row["format"] for row in summary["models"]}
    assert formats["KD"] == "bfloat16" and formats["KD as NF4"] == "nf4" and not summary["skipped"]
    rows = json.loads(artifacts(prefect_server, "ablation")[-1]["data"])
    assert len(rows) == len(summary["comparisons"]) and {"difference", "95 % interval", "p"} <= rows[0].keys()
    page = (report(run) / "index.html").read_text()
    assert "What each step changes" in page and all(f"<h3>{arm}</h3>" in page for arm in ARMS)  # their losses
    client = MlflowClient(f"sqlite:///{tmp_path}/home/mlflow.db")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert {*ARMS, "states for KD", "states for KD clipped"} <= {one.info.run_name for one in runs}

"""`prefect.yaml` as a user deploys it: real server, real worker, runs made over REST, artifacts on a real S3 server."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import yaml

from flows.reference import FLOWS
from tests.conftest import Bucket
from tests.flows.pico_run import ROOT, settings
from tests.prefect_server import PrefectServer
from tests.waiting import wait_until

PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]
DEPLOYMENTS = {"manual", "nightly", "api", "audit", "quantize", "bakeoff", "ablation"}


@pytest.fixture(scope="module")
def deployed(prefect_server: PrefectServer) -> dict[str, str]:
    """The deployments on a process pool, as `stillhouse deploy` makes them; the variables to work with them."""
    variables = prefect_server.environment | {"STILLHOUSE_ROOT": str(ROOT)}
    command = [sys.executable, "-m", "flows.cli", "deploy"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("stillhouse") == len(DEPLOYMENTS) + 1
    return variables


@pytest.fixture
def worker(deployed: dict[str, str], s3: Bucket, tmp_path: Path) -> Iterator[None]:
    """A worker that keeps its artifacts in S3."""
    environment = os.environ | deployed | {
        "STILLHOUSE_HOME": str(tmp_path / "home"), "STILLHOUSE_STORE": s3.uri,
        "PREFECT_WORKER_QUERY_SECONDS": "1", "STILLHOUSE_GPU_SLOT": "gpu-worker",
    }  # fmt: skip
    log = (tmp_path / "worker.log").open("wb")
    process = subprocess.Popen(
        [*PREFECT, "worker", "start", "--pool", "stillhouse"],
        cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    yield
    process.terminate()
    process.wait(timeout=60)


def create(server: PrefectServer, config: dict[str, Any], key: str, **others: str) -> httpx.Response:
    """What `curl -X POST .../create_flow_run` sends."""
    deployment = httpx.get(f"{server.url}/deployments/name/stillhouse/api").json()["id"]
    body = {"parameters": {"config": config, **others}, "idempotency_key": key}
    return httpx.post(f"{server.url}/deployments/{deployment}/create_flow_run", json=body, timeout=30)


def test_a_run_made_over_rest_completes_on_s3(
    worker: None, prefect_server: PrefectServer, s3: Bucket, tmp_path: Path
) -> None:
    few = {"max_new_tokens": 4, "limit_rows": 4, "latency_rows": 0, "perplexity_rows": 0}
    files = [{"kind": "Q8_0", "proof_rows": 4, "min_top1": 0.5}]
    config = settings(tmp_path, direct=False, gguf=files, evaluate=few)
    misspelt = create(prefect_server, {**config, "teachr_base": "x"}, "wrong")
    assert misspelt.status_code == 409 and "teachr_base" in misspelt.text
    nested = create(prefect_server, {**config, "teacher": {"rnak": 4}}, "wrong-too")
    assert nested.status_code == 409 and "rnak" in nested.text
    several = create(prefect_server, {**config, "teacher": {"max_length": 64}}, "wrong-three")
    assert several.status_code == 409 and "max_length" in several.text, "it is one setting for the whole run"
    outside = create(prefect_server, config, "wrong-four", trian="x")
    assert outside.status_code == 409 and "trian" in outside.text, "beside config as inside it"

    made = create(prefect_server, config, "night-1")
    assert made.status_code == 201
    again = create(prefect_server, config, "night-1")
    assert again.status_code == 200 and again.json()["id"] == made.json()["id"]

    def final_state() -> str:
        state = httpx.get(f"{prefect_server.url}/flow_runs/{made.json()['id']}").json()["state_type"]
        return str(state) if state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else ""

    assert wait_until(final_state, 600, 1) == "COMPLETED", (tmp_path / "worker.log").read_text()[-5000:]
    listed = boto3.client("s3").list_objects_v2(Bucket=s3.name, Prefix="team/stillhouse/index/")
    stages = {item["Key"].split("/")[3] for item in listed["Contents"]}
    expected = {
        "ingest",
        "teacher",
        "distill.teacher_cache",
        "distill",
        "outliers",
        "merge",
        "gguf",
        "evaluate",
        "gate",
    }
    assert stages - {"distill.teacher_cache.last"} == expected
    assert not (tmp_path / "home" / "store").exists()


def test_the_nightly_schedule_is_off_until_switched_on(deployed: dict[str, str], prefect_server: PrefectServer) -> None:
    nightly = httpx.get(f"{prefect_server.url}/deployments/name/stillhouse/nightly").json()
    assert [schedule["active"] for schedule in nightly["schedules"]] == [False]
    assert nightly["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
    [command] = re.findall(r"`prefect ([^`]*schedule resume[^`]*)`", (ROOT / "docs" / "operations.md").read_text())
    run = [sys.executable, "-m", "prefect", *command.split()]
    done = subprocess.run(run, cwd=ROOT, env=os.environ | deployed, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    nightly = httpx.get(f"{prefect_server.url}/deployments/name/stillhouse/nightly").json()
    assert [schedule["active"] for schedule in nightly["schedules"]] == [True]
    written = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    names = {one["name"] for one in written["deployments"]}
    assert names == DEPLOYMENTS
    audit = httpx.get(f"{prefect_server.url}/deployments/name/stillhouse-audit/audit").json()
    assert "OutlierConfig" in audit["parameter_openapi_schema"]["definitions"]
    manual = httpx.get(f"{prefect_server.url}/deployments/name/stillhouse/manual").json()
    form = manual["parameter_openapi_schema"]["definitions"]
    assert form["FineTuneConfig"]["properties"]["rank"]["description"].startswith("Rank of the LoRA")


def submitted(definitions: dict[str, Any], parameters: dict[str, Any], opened: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the UI's form sends when it is left as it is: parameters, defaults of all other fields; groups `opened`."""
    [fields] = [schema["properties"] for schema in definitions.values() if "ingest" in schema["properties"]]
    values = {name: parameters.get(name, field.get("default")) for name, field in fields.items()}
    for name in opened:
        group = definitions[fields[name]["anyOf"][0]["$ref"].rpartition("/")[2]]["properties"]
        values[name] = {key: field["default"] for key, field in group.items()}
    return values


@pytest.mark.parametrize(
    ("deployment", "preset", "groups"),
    [
        ("stillhouse/manual", "quickstart", ("ingest", "teacher", "student", "evaluate", "gate")),
        ("stillhouse-ablation/ablation", "ablation", ("teacher", "student", "evaluate")),
        ("stillhouse-audit/audit", "audit", ("ingest", "outliers")),
        ("stillhouse-quantize/quantize", "quantize", ("ingest", "evaluate", "gate")),
        ("stillhouse-bakeoff/bakeoff", "bakeoff", ("ingest", "evaluate")),
    ],
)
def test_an_untouched_form_is_its_preset(
    deployed: dict[str, str], prefect_server: PrefectServer, deployment: str, preset: str, groups: tuple[str, ...]
) -> None:
    """Closed, and with groups opened and left as they are."""
    config_class = FLOWS.get(preset, FLOWS["pipeline"])[1]
    config = config_class.model_validate({"preset": preset})
    details = httpx.get(f"{prefect_server.url}/deployments/name/{deployment}").json()
    schema, parameters = details["parameter_openapi_schema"], details["parameters"]["config"]
    for opened in ((), groups):
        assert config_class.model_validate(submitted(schema["definitions"], parameters, opened)) == config

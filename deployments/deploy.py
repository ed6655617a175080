"""Registers the deployments of `prefect.yaml` with the Prefect server that PREFECT_API_URL names.

    stillhouse deploy

What `prefect deploy --all` does, with the work pool, and with two things that `prefect.yaml` cannot express: a
parameter beside `config` is refused when a run is made, as an unknown setting inside it is; and a form shows the values
of the deployment's preset where it would show defaults.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate

from flows.presets import read_preset

ROOT = Path(__file__).parents[1]
FILE = ROOT / "deployments" / "prefect.yaml"
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]


def main() -> None:
    """Deploys everything; exits with Prefect's own message where it fails."""
    document = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    pools = {deployment["work_pool"]["name"] for deployment in document["deployments"]}
    with get_client(sync_client=True) as client:
        existing = {pool.name for pool in client.read_work_pools()}
    for pool in sorted(pools - existing):
        _prefect(["work-pool", "create", pool, "--type", "process"])
    _prefect(["deploy", "--all", "--prefect-file", str(FILE)])
    for name in complete_schemas({deployment["name"] for deployment in document["deployments"]}):
        print(name)
    print(f"Start a worker: prefect worker start --pool {', '.join(sorted(pools))}")


def complete_schemas(names: set[str]) -> list[str]:
    """Closes the parameter schema of the named deployments and puts their presets' values into it; full names."""
    completed = []
    with get_client(sync_client=True) as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        for deployment in client.read_deployments():
            flow = flows.get(deployment.flow_id, "")
            if deployment.name in names and flow.startswith("stillhouse"):
                schema = {**(deployment.parameter_openapi_schema or {}), "additionalProperties": False}
                preset = (deployment.parameters.get("config") or {}).get("preset")
                if preset:
                    _show_preset(schema, read_preset(preset))
                client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))
                completed.append(f"{flow}/{deployment.name}")
    return sorted(completed)


def _show_preset(schema: dict[str, Any], settings: dict[str, Any]) -> None:
    """Makes a preset's settings the defaults of the form."""
    definitions = schema["definitions"]
    fields = definitions[schema["properties"]["config"]["$ref"].rpartition("/")[2]]["properties"]
    for name, value in settings.items():
        reference = next((choice["$ref"] for choice in fields[name].get("anyOf", ()) if "$ref" in choice), None)
        if reference is None:
            fields[name]["default"] = value
        else:
            for key, inner in value.items():
                definitions[reference.rpartition("/")[2]]["properties"][key]["default"] = inner


def _prefect(arguments: list[str]) -> None:
    process = subprocess.run([*PREFECT, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"stillhouse: prefect {' '.join(arguments)} failed:\n{process.stdout}{process.stderr}")


if __name__ == "__main__":
    main()

"""The images and the compose file, as far as they can be checked without a container engine."""

import fnmatch
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import prefect.settings
import pytest
import yaml

from tasks.core.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
IMAGES = ["orchestrator", "worker"]
# Read by the base images and the container runtime, whose sources are not installed.
EXTERNAL = {
    *("POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"),
    *("PYTHONPATH", "PYTHONUNBUFFERED", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"),
}


def operands(image: str, keyword: str) -> list[str]:
    """What follows `keyword` in a Dockerfile's instructions, comments dropped and continued lines joined."""
    lines = (DOCKER / f"{image}.Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", " ")
    instructions = (line.partition(" ") for line in text.splitlines() if line.strip())
    return [operand for word, _, operand in instructions if word == keyword]


def arguments(image: str) -> dict[str, str]:
    """The `ARG`s and their defaults."""
    return dict(argument.split("=", 1) for argument in operands(image, "ARG"))


def variables() -> set[str]:
    """Every environment variable that a container gets."""
    names = {name for service in SERVICES.values() for name in service.get("environment", {})}
    for image in IMAGES:
        names |= {pair.split("=")[0] for pairs in operands(image, "ENV") for pair in pairs.split()}
    return names


def package(name: str, *files: str) -> str:
    """The text of files of an installed package, which is not imported: mlflow alone would take seconds."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return "\n".join((Path(spec.origin).parent / file).read_text() for file in files)


def test_every_variable_is_read_by_its_program() -> None:
    settings = {"STILLHOUSE_" + name.upper() for name in Settings.model_fields}
    settings |= set(re.findall(r"\$(STILLHOUSE_\w+)", (ROOT / "deployments/prefect.yaml").read_text()))
    settings |= set(re.findall(r'environ\["(STILLHOUSE_\w+)"\]', (ROOT / "tasks/core/provenance.py").read_text()))
    readers = {
        "MLFLOW": package("mlflow", "environment_variables.py", "cli/__init__.py", "utils/cli_args.py"),
        "AWS": package("botocore", "configprovider.py", "credentials.py"),
        "HF": package("huggingface_hub", "constants.py", "utils/_auth.py"),
        "DO": package("prefect", "_internal/analytics/enabled.py"),
    }

    def read(name: str) -> bool:
        prefix = name.split("_")[0]
        if prefix == "STILLHOUSE":
            return name in settings
        if prefix == "PREFECT":
            return hasattr(prefect.settings, name)
        name = name.removesuffix("_S3")  # botocore makes AWS_ENDPOINT_URL_<SERVICE> itself
        return re.search(rf"\b{name}\b", readers.get(prefix, "")) is not None

    names = variables()
    assert {"STILLHOUSE_STORE", "PREFECT_API_URL", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3", "HF_TOKEN"} <= names
    assert {name for name in names - EXTERNAL if not read(name)} == set()


def test_the_documented_variables_are_those_of_the_compose_file() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    required = set(re.findall(r"\$\{(\w+)", text)) | set(re.findall(r"^ +([A-Z_0-9]+):$", text, re.MULTILINE))
    table = (DOCKER / "README.md").read_text().split("## Variables")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == required


@pytest.mark.parametrize("name", ["POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "S3_BUCKET"])
def test_a_secret_has_no_default(name: str) -> None:
    uses = re.findall(rf"\$\{{{name}(.{{0,2}})", (DOCKER / "compose.yaml").read_text())
    assert uses and set(uses) == {":?"}


def test_mlflow_lets_in_the_host_name_that_the_worker_uses() -> None:
    command = SERVICES["mlflow"]["command"]
    allowed = command[command.index("--allowed-hosts") + 1].split(",")
    host = urlsplit(SERVICES["worker"]["environment"]["MLFLOW_TRACKING_URI"]).netloc
    for required in (host, "localhost:5000", "127.0.0.1:5000"):
        assert any(fnmatch.fnmatch(required, pattern) for pattern in allowed), f"MLflow would answer 403 to {required}"


def test_services_find_each_other() -> None:
    for service in SERVICES.values():
        for value in filter(None, service.get("environment", {}).values()):
            inside = re.search(r"(?:@|^http://)([a-z]+):(\d+)", str(value))
            assert inside is None or inside[1] in SERVICES
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        for after, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[after]
    pool = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["definitions"]["common"]["work_pool"]["name"]
    assert SERVICES["deploy"]["command"] == ["python", "-m", "deployments.deploy"], "it makes the file's pools"
    worker = next(command for command in operands("worker", "CMD") if "prefect" in command)
    assert f'"--pool", "{pool}"' in worker


def test_services_without_a_password_listen_on_loopback_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == 2 and all(port.startswith("127.0.0.1:") for port in published)


def test_a_restarted_server_keeps_the_gpu_slot_s_holder() -> None:
    server = SERVICES["prefect"]
    assert server["environment"]["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"].endswith("lease_storage.filesystem")
    volume = server["volumes"][0].split(":")[1]
    assert f"PREFECT_HOME={volume}/" in (DOCKER / "orchestrator.Dockerfile").read_text()
    assert "hostname" in SERVICES["worker"], "the slot gpu-<host> would be another one for every new container"


@pytest.mark.parametrize("image", IMAGES)
def test_compose_builds_existing_images(image: str) -> None:
    builds = [service["build"] for service in SERVICES.values() if service.get("image") == f"stillhouse-{image}"]
    assert builds
    for build in builds:
        assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / f"{image}.Dockerfile")
        assert set(build.get("args", {})) <= set(arguments(image))


@pytest.mark.parametrize("image", IMAGES)
def test_every_copied_file_passes_dockerignore(image: str) -> None:
    let_through = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = {source for paths in operands(image, "COPY") for source in shlex.split(paths)[:-1]}
    assert {"flows", "tasks", "deployments", "constraints.txt"} <= copied <= set(let_through)
    assert all((ROOT / source).exists() for source in copied)


def test_the_orchestrator_has_no_torch() -> None:
    installs = [command for command in operands("orchestrator", "RUN") if "pip install" in command]
    assert installs and not any("[gpu]" in command or "torch" in command for command in installs)


@pytest.mark.parametrize("image", IMAGES)
def test_versions_are_those_of_the_constraints(image: str) -> None:
    installs = [command for command in operands(image, "RUN") if "/tmp/stillhouse" in command]
    assert installs and all("--constraint /tmp/stillhouse/constraints.txt" in command for command in installs)
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    build_arguments = arguments(image)
    assert build_arguments.get("TORCH", pins["torch"]) == pins["torch"]
    assert build_arguments["BASE"].startswith("python:3.11-")


@pytest.mark.parametrize("image", IMAGES)
def test_no_image_runs_as_root(image: str) -> None:
    users = operands(image, "USER")
    assert users and users[-1].isdigit() and int(users[-1]) > 0


def test_prefect_may_unpack_its_ui() -> None:
    home = operands("orchestrator", "ENV")
    static = re.search(r"PREFECT_SERVER_UI_STATIC_DIRECTORY=(\S+)", " ".join(home))
    assert static and static[1].startswith("/tmp/"), "a user that is not root gets no UI from Prefect's own package"

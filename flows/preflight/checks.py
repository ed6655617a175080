"""All checks in order, and how they are shown: each is ok, a warning, or a failure that stops the run."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.flow_config import FlowConfig
from flows.preflight.machine import check_machine
from flows.preflight.models import check_models, check_pins
from flows.preflight.needs import check_top_k, first_file, libraries, trainings
from tasks.core.child_process import run_command
from tasks.core.errors import BadConfig, StageError
from tasks.core.plain_text import visible
from tasks.core.settings import Settings
from tasks.preflight import Check, PreflightConfig

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
TIMEOUT_SECONDS = 300.0


def preflight(config: FlowConfig | None, settings: Settings) -> list[Check]:
    """Every check that can be made; without a config those of the machine."""
    return list(_checks(config, settings))


def _checks(config: FlowConfig | None, settings: Settings) -> Iterator[Check]:
    card, checks = check_machine(config, settings)
    yield from checks
    if config is None or any(check.name == "torch stack" and check.state == "fail" for check in checks):
        return
    yield from check_pins(config)
    yield from check_top_k(config)
    directories, checks = check_models(config)
    yield from checks
    yield from _in_child(config, settings, directories, card)


def _in_child(
    config: FlowConfig, settings: Settings, directories: dict[str, Path], card_gib: float | None
) -> Iterator[Check]:
    """The checks that need torch and transformers, by `tasks.preflight.run`."""
    rows, problem = first_file(config)
    if problem is not None:
        yield problem
    ingest = cast(Any, config).ingest
    if not any(getattr(config, split, None) for split in ("train", "test")):
        directories = {}  # without rows only weights are read, and a base model may lack a chat template
    document = PreflightConfig(
        rows=rows, format=ingest.format, system_prompt=ingest.system_prompt, ignore_fields=ingest.ignore_fields,
        max_length=config.max_length, over_long=ingest.over_long, chat_template=config.chat_template,
        same_tokenizer=hasattr(config, "student_base"), card_gib=card_gib,
        trainings=trainings(config), libraries=libraries(config),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="preflight-", dir=settings.root) as scratch:
        directory = Path(scratch)
        (directory / "config.json").write_text(document.model_dump_json())
        arguments = [str(directory / "config.json"), "--out", str(directory / "out")]
        for name, path in directories.items():
            arguments += ["--models", f"{name}={path}"]
        try:
            run_command(
                "tasks.preflight.run", arguments, directory / "work", lambda _: None, TIMEOUT_SECONDS,
                TIMEOUT_SECONDS, settings.warm,
            )  # fmt: skip
        except StageError as error:
            result = f"tokenizers, first rows and memory were not checked: {error}"
            yield Check("preflight command", "warn", result, "stillhouse doctor repeats it")
            return
        report = json.loads((directory / "out" / "report.json").read_text())
    yield from (Check(*check) for check in report["details"]["checks"])


def require_none_failed(checks: list[Check]) -> None:
    """Raises BadConfig with every failed check and its remedy."""
    failed = [f"{check.name}: {check.result}. {check.remedy}" for check in checks if check.state == "fail"]
    if failed:
        raise BadConfig("the run would fail, so it does not start:\n  " + "\n  ".join(failed))


def render(checks: list[Check], console: Console) -> None:
    """The table in a terminal."""
    table = Table(title="Preflight", show_lines=False)
    for column in ("", "check", "result", "remedy"):
        table.add_column(column, overflow="fold")
    for check in checks:
        remedy = check.remedy if check.state != "ok" else ""
        table.add_row(
            f"[{STYLES[check.state]}]{check.state}[/]", *map(Text, map(visible, (check.name, check.result, remedy)))
        )
    console.print(table)

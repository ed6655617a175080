"""The gate stage's task, and what a flow does with its verdict once the report is written."""

from prefect import task

from tasks.core.errors import GateFailed
from tasks.core.refs import ReportRef
from tasks.core.retry import TASK
from tasks.core.shell import run_stage
from tasks.gate import GateConfig


@task(name="gate", **TASK)
def gate(config: GateConfig, evaluations: dict[str, ReportRef]) -> ReportRef:
    """The verdict over evaluations by name (`teacher`, `student`, `student-base`, GGUF kinds); it does not fail."""
    return run_stage("gate", config, {"evaluations": evaluations}, ReportRef, "gate")


def require_passed(verdict: ReportRef) -> None:
    """Raises GateFailed with the numbers of every rule that was broken."""
    if not verdict.facts["passed"]:
        raise GateFailed(str(verdict.facts["said"]))

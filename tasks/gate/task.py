"""The gate stage's task, and how a flow fails by its result once the report is written."""

from prefect import task

from tasks.core.errors import GateFailed, StageError
from tasks.core.refs import ReportRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.shell import run_stage
from tasks.gate import GateConfig


@task(name="gate", **TASK_OPTIONS)
def gate(config: GateConfig, evaluations: dict[str, ReportRef]) -> ReportRef:
    """Judges evaluations by name (`teacher`, `student`, `student-base`, GGUF kinds); a broken rule does not fail it."""
    return run_stage("gate", config, {"evaluations": evaluations}, ReportRef, "gate")


def require_passed(result: ReportRef | StageError) -> None:
    """Raises GateFailed with the sentence of every rule that did not pass; raises the error of a gate that failed."""
    if isinstance(result, StageError):
        raise result
    if not result.facts["passed"]:
        raise GateFailed(str(result.facts["said"]))

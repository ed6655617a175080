"""What a run ends with: `summary.json`, one page for people, a table in the terminal, Prefect's artifacts."""

from flows.report.publish import publish
from flows.report.terminal import show

__all__ = ["publish", "show"]

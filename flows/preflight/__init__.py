"""Checks a run before it starts: machine, services, base models, first rows, memory. Shared by flows and `doctor`."""

from flows.preflight.checks import preflight as preflight
from flows.preflight.checks import render as render
from flows.preflight.checks import require_none_failed as require_none_failed

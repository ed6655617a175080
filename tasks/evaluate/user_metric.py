"""Loads the metric that the user wrote, by import path: `module:function`, called with (question, expected, answer)."""

import importlib
from collections.abc import Callable
from numbers import Real

from tasks.core.errors import BadConfig

UserMetric = Callable[[str, str, str], float]


def load_metric(path: str) -> UserMetric:
    """The function, looked for on PYTHONPATH and in the working directory. Raises BadConfig when it is not there."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise BadConfig(f"metric {path!r}: {error}; put the module's directory on PYTHONPATH") from error
    except AttributeError as error:
        raise BadConfig(f"metric {path!r}: module {module} has no {name}") from error
    if not callable(function):
        raise BadConfig(f"metric {path!r} is a {type(function).__name__}, not a function")

    def metric(question: str, expected: str, answer: str) -> float:
        value = function(question, expected, answer)
        if not isinstance(value, Real) or not 0 <= float(value) <= 1:  # NaN is neither
            raise BadConfig(
                f"metric {path!r} gave {value!r} for the question {question[:80]!r}: it must be a number from 0 to 1, "
                "for it is shown as a percentage and the gate counts its points"
            )
        return float(value)

    return metric

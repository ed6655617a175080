"""Loss scaling for float16: gradients smaller than its smallest number would become 0, so the loss is multiplied.

Mixed precision training, arXiv 1710.03740: the factor is halved when a gradient overflows, the step left out, and
doubled after a while without.
"""

import math

START, LEAST, GROW_AFTER = 2.0**12, 1.0, 500


class LossScale:
    """The factor now, and how many steps have gone well under it."""

    def __init__(self, used: bool) -> None:
        self.used = used
        self.factor = START if used else 1.0
        self.good = 0

    def overflowed(self, loss: float, norm: float) -> bool:
        """Whether the step has to be left out: its gradients overflowed though its loss is finite. Adapts the factor.

        Below a factor of 1 it is no overflow of float16 any more, and the step counts as diverged.
        """
        if not self.used or not math.isfinite(loss):
            return False
        if not math.isfinite(norm):
            self.factor, self.good = self.factor / 2, 0
            return self.factor >= LEAST
        self.good += 1
        if self.good >= GROW_AFTER:
            self.factor, self.good = self.factor * 2, 0
        return False

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"factor": self.factor, "good": self.good}

    def restore(self, state: dict[str, float]) -> None:
        """From a checkpoint; one of another precision has nothing to say."""
        if self.used and state.get("factor", 1.0) > 1.0:
            self.factor, self.good = state["factor"], int(state["good"])

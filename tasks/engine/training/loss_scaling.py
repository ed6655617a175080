"""Dynamic loss scaling for float16: the loss is multiplied so that small gradients do not underflow to 0.

Mixed precision training, arXiv 1710.03740: the factor is halved and the step left out when a gradient overflows;
the factor is doubled after `GROW_AFTER` steps without an overflow.
"""

import math

START, MINIMUM, GROW_AFTER = 2.0**12, 1.0, 500


class LossScale:
    """The present factor, and the number of steps since it last changed; 1 throughout where not `used`."""

    def __init__(self, used: bool) -> None:
        self.used = used
        self.factor = START if used else 1.0
        self.good_steps = 0

    def overflowed(self, loss: float, norm: float) -> bool:
        """Whether the step has to be left out: its gradients overflowed though its loss is finite. Adapts the factor.

        Below a factor of 1 it is no overflow of float16 any more, and the step counts as diverged.
        """
        if not self.used or not math.isfinite(loss):
            return False
        if not math.isfinite(norm):
            self.factor, self.good_steps = self.factor / 2, 0
            return self.factor >= MINIMUM
        self.good_steps += 1
        if self.good_steps >= GROW_AFTER:
            self.factor, self.good_steps = self.factor * 2, 0
        return False

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"factor": self.factor, "good": self.good_steps}

    def restore(self, state: dict[str, float]) -> None:
        """From a checkpoint, unless it is of a run in another precision."""
        if self.used and state.get("factor", 1.0) > 1.0:
            self.factor, self.good_steps = state["factor"], int(state["good"])

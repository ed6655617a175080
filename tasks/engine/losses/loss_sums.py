"""What an objective computes of a micro-batch."""

from typing import NamedTuple

from torch import Tensor


class LossSums(NamedTuple):
    """Sums over a micro-batch, scalars: `loss`, through which the gradient flows, and `metrics` to report by name."""

    loss: Tensor
    metrics: dict[str, Tensor] = {}

    def by_name(self) -> dict[str, Tensor]:
        """All sums, `loss` first."""
        return {"loss": self.loss, **self.metrics}

    def detach(self) -> "LossSums":
        """The same sums without their graph."""
        return LossSums(self.loss.detach(), {name: value.detach() for name, value in self.metrics.items()})

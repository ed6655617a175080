"""Registry of quantization methods: what the config accepts, the flow runs, and the audit's verdict predicts.

A method is one decorated function in `tasks.bakeoff.methods`:

    @method("bnb-nf4", "NF4 with double quantization", library="bitsandbytes")
    def bnb_nf4(source: SourceModel) -> QuantizedModel: ...

Flows import this module and the methods' own, so neither imports torch or a quantization library.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, NamedTuple

from tasks.core.named_choice import NameIn

if TYPE_CHECKING:
    from tasks.bakeoff.source_model import QuantizedModel, SourceModel

Quantize = Callable[["SourceModel"], "QuantizedModel"]


class Method(NamedTuple):
    """A quantization method.

    `library` is the distribution that has to be installed, empty where the project's own requirements suffice.
    `targets` are the audit's targets that predict its outcome, in addition to that of the dtype that it runs in;
    `unsafe_reason` says why it is unsafe on every model.
    """

    name: str
    title: str
    quantize: Quantize
    library: str
    needs_gpu: bool
    targets: tuple[str, ...]
    unsafe_reason: str

    def cannot_run(self, device: str) -> str | None:
        """Why the method is skipped on this machine; None where it can run."""
        if self.library and not _installed(self.library):
            return f"not installed: {self.library}"
        return f"needs a GPU, and runs on {device}" if self.needs_gpu and device == "cpu" else None


METHODS: dict[str, Method] = {}
"""Every method by name, in the order in which the flow tries them."""


def method(
    name: str,
    title: str,
    library: str = "",
    needs_gpu: bool = False,
    targets: tuple[str, ...] = (),
    unsafe_reason: str = "",
) -> Callable[[Quantize], Quantize]:
    """Registers the decorated function; see `Method` for what the arguments mean."""

    def register(quantize: Quantize) -> Quantize:
        METHODS[name] = Method(name, title, quantize, library, needs_gpu, targets, unsafe_reason)
        return quantize

    return register


def _installed(library: str) -> bool:
    try:
        return bool(version(library))
    except PackageNotFoundError:
        return False


MethodName = Annotated[str, NameIn(METHODS)]
"""Name of a registered method."""

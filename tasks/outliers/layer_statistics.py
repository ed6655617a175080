"""What is kept of a model's activations: channels of linear layers, peaks behind norms, the stream by layer."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Channels:
    """A linear layer's inputs by channel: sums of squares in float64 and largest magnitudes; and its outputs' peak."""

    squares: Tensor
    maxima: Tensor
    tokens: int = 0
    token_peaks: float = 0.0
    output_peak: float = 0.0

    @property
    def mean_squares(self) -> Tensor:
        """[in], float64."""
        return self.squares / max(1, self.tokens)


@dataclass
class Peak:
    """The largest magnitude at a place in the stream, and which token and channel had it."""

    value: float = 0.0
    row: int = 0
    position: int = 0
    token: int = 0
    channel: int = 0


@dataclass
class Layer:
    """The stream at a decoder layer: behind attention, behind the MLP; attention to the first token, and its size."""

    middle: Peak = field(default_factory=Peak)
    output: Peak = field(default_factory=Peak)
    sink_mass: float = 0.0
    sink_norm: float = 0.0


@dataclass
class Activations:
    """Everything seen; `norms` are the peaks behind each norm, `stream` the embedding's peak."""

    linears: dict[str, Channels] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    layers: dict[int, Layer] = field(default_factory=dict)
    embedding: Peak = field(default_factory=Peak)
    rows: int = 0
    tokens: int = 0
    not_finite: int = 0

    @property
    def stream_peak(self) -> float:
        """The largest magnitude in the residual stream."""
        return max([self.embedding.value, *(max(one.middle.value, one.output.value) for one in self.layers.values())])

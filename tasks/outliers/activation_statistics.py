"""Activation statistics of a model: inputs of linear layers by channel, norms' peaks, the residual stream by layer."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class ChannelStatistics:
    """A linear layer's inputs by channel, and the largest magnitude of its outputs.

    `squares` [in] are sums over tokens in float64, `maxima` [in] largest magnitudes; `token_peaks` is the sum over
    tokens of the squared largest magnitude in a token.
    """

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
    """The largest magnitude at one point of the residual stream, and which row, token and channel had it."""

    value: float = 0.0
    row: int = 0
    position: int = 0
    token: int = 0
    channel: int = 0


@dataclass
class LayerStatistics:
    """The residual stream after attention (`middle`) and after the MLP (`output`), and the first token as a sink.

    `sink_mass` is the mean attention that other tokens pay to the first one, `sink_norm` the first token's norm over
    the median of the others (massive activations, arXiv 2402.17762).
    """

    middle: Peak = field(default_factory=Peak)
    output: Peak = field(default_factory=Peak)
    sink_mass: float = 0.0
    sink_norm: float = 0.0


@dataclass
class ActivationStatistics:
    """Everything measured of one model: `norms` holds each norm's output peak, `embedding` the stream's at layer 0."""

    linears: dict[str, ChannelStatistics] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    layers: dict[int, LayerStatistics] = field(default_factory=dict)
    embedding: Peak = field(default_factory=Peak)
    rows: int = 0
    tokens: int = 0
    not_finite: int = 0

    @property
    def stream_peak(self) -> float:
        """The largest magnitude in the residual stream."""
        layers = self.layers.values()
        return max([self.embedding.value, *(max(layer.middle.value, layer.output.value) for layer in layers)])

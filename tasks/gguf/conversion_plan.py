"""The conversion plan of a file: type of every tensor and size in bytes, known before anything is written."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tasks.engine.runtimes.ggml_types import FLOATS, TYPES, tensor_bytes
from tasks.gguf.header import TensorInfo, file_bytes, pack_text, pack_uint32
from tasks.gguf.imatrix import read_imatrix
from tasks.gguf.kinds import KINDS
from tasks.gguf.roles import layer_order, role
from tasks.gguf.sensitive import RaisedType, sentence
from tasks.gguf.tensor_types import KindOptions, choose_types


class ModelLayout(NamedTuple):
    """Names, shapes and 16- or 32-bit types of a model's tensors, as llama.cpp's converter hands them on.

    Shapes have the row length first. Types are F32 where nothing else may be, BF16 elsewhere, which stands for
    `stored`, the type of the model's own matrices. `value_sizes` are the bytes of its metadata by key.
    """

    architecture: str
    layers: int
    heads_per_kv: int
    value_sizes: dict[str, int]
    stored: str
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]

    def options(self, kind: str, **settings: Any) -> KindOptions:
        """A kind with this model's numbers."""
        return KindOptions(kind, self.layers, self.heads_per_kv, **settings)


class PlannedTensor(NamedTuple):
    """A tensor's type in the file, and the type that the kind's mixture prefers for it."""

    name: str
    shape: tuple[int, ...]
    source: str
    preferred: str
    type: str

    @property
    def fell_back(self) -> bool:
        """Whether llama.cpp takes another type because the rows do not fill the preferred one's blocks."""
        return self.preferred != self.type

    @property
    def bytes(self) -> int:
        """Bytes in the file, without padding."""
        return tensor_bytes(self.type, self.shape)


class ConversionPlan(NamedTuple):
    """Tensors in the file's order, and the file's size in bytes.

    `texts` are metadata to set. `advice` are better types for sensitive tensors; where `raised`, `tensors` have them.
    """

    options: KindOptions
    tensors: list[PlannedTensor]
    bytes: int
    texts: dict[str, str]
    imatrix: Path | None = None
    advice: tuple[RaisedType, ...] = ()
    raised: bool = False

    @property
    def kind(self) -> str:
        """The file's kind."""
        return self.options.kind

    @property
    def fell_back(self) -> list[PlannedTensor]:
        """Tensors with another type than the mixture prefers."""
        return [tensor for tensor in self.tensors if tensor.fell_back]

    @property
    def types(self) -> dict[str, int]:
        """Number of tensors by type."""
        return dict(sorted(Counter(tensor.type for tensor in self.tensors).items()))

    @property
    def weighed(self) -> list[PlannedTensor]:
        """Tensors whose rounding errors the importance matrix weighs."""
        weights = read_imatrix(self.imatrix).weights if self.imatrix else {}
        return [tensor for tensor in self.tensors if tensor.name in weights and TYPES[tensor.type].weighs]

    @property
    def needs_imatrix(self) -> str | None:
        """The first tensor whose type llama.cpp refuses to make without an importance matrix, with that type."""
        for tensor in self.tensors:
            refused = TYPES[tensor.type].needs_imatrix or (tensor.type == "Q2_K" and self.kind == "Q2_K_S")
            if refused and role(tensor.name) not in ("embedding", "output"):
                return f"{tensor.type} for {tensor.name}"
        return None

    def sentence(self) -> str:
        """The plan in a sentence, for the log."""
        types = ", ".join(f"{count} {name}" for name, count in self.types.items())
        head = f"{self.kind}: {self.bytes / 1e6:.1f} MB; {types}"
        if self.advice and self.raised:
            head += f"; sensitive tensors raised: {sentence(self.advice)}"
        if not self.fell_back:
            return f"{head}; no tensor falls back"
        rows = ", ".join(map(str, sorted({tensor.shape[0] for tensor in self.fell_back})))
        changes = sorted({f"{tensor.preferred} becomes {tensor.type}" for tensor in self.fell_back})
        return (
            f"{head}; {len(self.fell_back)} tensors fall back ({', '.join(changes)}): their rows ({rows} values) do "
            "not fill the blocks"
        )

    def table(self) -> list[dict[str, Any]]:
        """One row per tensor, as JSON."""
        return [
            {**tensor._asdict(), "shape": list(tensor.shape), "bytes": tensor.bytes, "fell_back": tensor.fell_back}
            for tensor in self.tensors
        ]


def make_plan(
    layout: ModelLayout, options: KindOptions, texts: dict[str, str] | None = None, imatrix: Path | None = None
) -> ConversionPlan:
    """The plan by llama.cpp's rules; `texts` and the entries of `imatrix` about itself go into the metadata."""
    float_type = options.kind if options.kind in FLOATS else layout.stored
    sources = {name: float_type if type_ == "BF16" else type_ for name, type_ in layout.types.items()}
    chosen = choose_types(options, layout.shapes, sources)
    quantized = options.kind not in FLOATS
    names = sorted(layout.shapes, key=layer_order) if quantized else list(layout.shapes)
    tensors = [PlannedTensor(name, layout.shapes[name], sources[name], *reversed(chosen[name])) for name in names]
    sizes = dict(layout.value_sizes)
    if quantized:
        sizes |= dict.fromkeys(("general.quantization_version", "general.file_type"), len(pack_uint32(0)))
        sizes |= {key: len(value) for key, value in (read_imatrix(imatrix).values() if imatrix else {}).items()}
    sizes |= {key: len(pack_text(text)) for key, text in (texts or {}).items()}
    size = file_bytes(sizes, [TensorInfo(tensor.name, tensor.shape, tensor.type) for tensor in tensors])
    return ConversionPlan(options, tensors, size, texts or {}, imatrix)


def require_imatrix(plan: ConversionPlan) -> None:
    """Raises ValueError for a plan without an importance matrix whose kind, or a tensor's type, is garbage without."""
    reason = plan.kind if KINDS[plan.kind].needs_imatrix else plan.needs_imatrix
    if reason and plan.imatrix is None:
        alternatives = [name for name, kind in KINDS.items() if kind.auto and not kind.needs_imatrix][-4:]
        raise ValueError(
            f"{reason} needs an importance matrix, without which it is garbage: give the output of the outliers stage "
            f"with an imatrix.gguf (--outliers DIR), or take a kind that needs none: {', '.join(alternatives)}"
        )


def plans_by_size(layout: ModelLayout, kinds: list[str], **settings: Any) -> list[ConversionPlan]:
    """A plan for each kind, the largest file first; kinds that need an importance matrix are planned as with one."""
    plans = [make_plan(layout, layout.options(kind, imatrix=KINDS[kind].needs_imatrix, **settings)) for kind in kinds]
    return sorted(plans, key=lambda plan: -plan.bytes)

"""The plan: what every tensor of a kind becomes and how many bytes the file will have, before anything is written.

python -m tasks.gguf.plan MODEL_DIR [--kinds Q8_0 Q4_K_M] [--embedding-type Q4_0] [--output-type Q6_K]
"""

import argparse
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.errors import StageError
from tasks.core.job import Job
from tasks.gguf.header import TensorInfo, file_bytes, pack_text, pack_uint32
from tasks.gguf.imatrix import read_imatrix
from tasks.gguf.kinds import FLOATS, KINDS, NEED_IMATRIX, TYPES, tensor_bytes
from tasks.gguf.mixture import Wanted, choose, layer_order, role


class Skeleton(NamedTuple):
    """A model as the converter hands it on: shapes with the row length first; types are BF16 or, where only that may
    be, F32.

    `values` are the sizes of its metadata, by key; `stored` is the type that matrices have which are not quantized.
    """

    architecture: str
    layers: int
    heads_per_kv: int
    values: dict[str, int]
    stored: str
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]

    def wanted(self, kind: str, **options: Any) -> Wanted:
        """A kind for this model."""
        return Wanted(kind, self.layers, self.heads_per_kv, **options)


class Planned(NamedTuple):
    """What becomes of a tensor; `asked` is what the kind's mixture wanted."""

    name: str
    shape: tuple[int, ...]
    source: str
    asked: str
    type: str

    @property
    def fell_back(self) -> bool:
        """Whether llama.cpp takes another type because the rows do not fill the blocks of the one asked for."""
        return self.asked != self.type

    @property
    def bytes(self) -> int:
        """In the file, without padding."""
        return tensor_bytes(self.type, self.shape)


class Plan(NamedTuple):
    """A file before it is written: its tensors in their order, and its size in bytes."""

    wanted: Wanted
    tensors: list[Planned]
    bytes: int
    texts: dict[str, str]
    imatrix: Path | None = None

    @property
    def fell_back(self) -> list[Planned]:
        """The tensors that get another type than the mixture wanted."""
        return [tensor for tensor in self.tensors if tensor.fell_back]

    @property
    def types(self) -> dict[str, int]:
        """How many tensors have which type."""
        return dict(sorted(Counter(tensor.type for tensor in self.tensors).items()))

    @property
    def needs_imatrix(self) -> str | None:
        """The first tensor that llama.cpp does not quantize to its type without an importance matrix, and that type."""
        for tensor in self.tensors:
            low = tensor.type in NEED_IMATRIX or (tensor.type == "Q2_K" and self.wanted.kind == "Q2_K_S")
            if low and role(tensor.name) not in ("embedding", "output"):
                return f"{tensor.type} for {tensor.name}"
        return None

    def sentence(self) -> str:
        """The plan as a person reads it."""
        types = ", ".join(f"{count} {name}" for name, count in self.types.items())
        head = f"{self.wanted.kind}: {self.bytes / 1e6:.1f} MB; {types}"
        if not self.fell_back:
            return f"{head}; no tensor falls back"
        rows = ", ".join(map(str, sorted({tensor.shape[0] for tensor in self.fell_back})))
        changes = sorted({f"{tensor.asked} becomes {tensor.type}" for tensor in self.fell_back})
        return (
            f"{head}; {len(self.fell_back)} tensors fall back ({', '.join(changes)}): their rows ({rows} values) do "
            "not fill the blocks"
        )

    def table(self) -> list[dict[str, Any]]:
        """A row a tensor, as JSON."""
        return [
            {**tensor._asdict(), "shape": list(tensor.shape), "bytes": tensor.bytes, "fell_back": tensor.fell_back}
            for tensor in self.tensors
        ]


def make_plan(
    skeleton: Skeleton, wanted: Wanted, texts: dict[str, str] | None = None, imatrix: Path | None = None
) -> Plan:
    """What llama.cpp's rules make of `skeleton`; `texts` and what `imatrix` says of itself go into the metadata."""
    float_type = wanted.kind if wanted.kind in FLOATS else skeleton.stored
    found = {name: float_type if type_ == "BF16" else type_ for name, type_ in skeleton.types.items()}
    chosen = choose(wanted, skeleton.shapes, found)
    quantized = wanted.kind not in FLOATS
    names = sorted(skeleton.shapes, key=layer_order) if quantized else list(skeleton.shapes)
    tensors = [Planned(name, skeleton.shapes[name], found[name], *reversed(chosen[name])) for name in names]
    sizes = dict(skeleton.values)
    if quantized:
        sizes |= dict.fromkeys(("general.quantization_version", "general.file_type"), len(pack_uint32(0)))
        sizes |= {key: len(value) for key, value in (read_imatrix(imatrix).values() if imatrix else {}).items()}
    sizes |= {key: len(pack_text(text)) for key, text in (texts or {}).items()}
    size = file_bytes(sizes, [TensorInfo(one.name, one.shape, one.type) for one in tensors])
    return Plan(wanted, tensors, size, texts or {}, imatrix)


def require_imatrix(plan: Plan) -> None:
    """Raises ValueError for a kind, or a tensor's type, that is garbage without an importance matrix when none is."""
    what = plan.wanted.kind if plan.wanted.kind in NEED_IMATRIX else plan.needs_imatrix
    if what and plan.imatrix is None:
        raise ValueError(
            f"{what} needs an importance matrix, without which it is garbage: give the output of the outliers stage "
            "with an imatrix.gguf (--outliers DIR), or take a kind that needs none: IQ3_M, IQ3_S, Q3_K_S, Q2_K"
        )


def all_sizes(skeleton: Skeleton, kinds: list[str], **options: Any) -> list[Plan]:
    """A plan a kind, the largest file first; where a kind needs an importance matrix, as if there were one."""
    plans = [make_plan(skeleton, skeleton.wanted(kind, imatrix=kind in NEED_IMATRIX, **options)) for kind in kinds]
    return sorted(plans, key=lambda plan: -plan.bytes)


def markdown(plans: list[Plan]) -> str:
    """A table of kinds: megabytes, bytes, bits a weight, types, what falls back, and whether it needs an imatrix."""
    lines = ["| kind | MB | bytes | bits a weight | tensors | fall back | |", "|---|---|---|---|---|---|---|"]
    for plan in plans:
        weights = sum(math.prod(tensor.shape) for tensor in plan.tensors)
        types = ", ".join(f"{count} {name}" for name, count in plan.types.items())
        needs = "needs an imatrix" if plan.wanted.kind in NEED_IMATRIX or plan.needs_imatrix else ""
        numbers = f"{plan.bytes / 1e6:.1f} | {plan.bytes} | {8 * plan.bytes / weights:.2f}"
        lines.append(f"| {plan.wanted.kind} | {numbers} | {types} | {len(plan.fell_back)} | {needs} |")
    return "\n".join(lines)


def tensors_markdown(plan: Plan) -> str:
    """A table of the tensors, those of a layer as one line with the layers that are alike."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for tensor in plan.tensors:
        layer, _, rest = tensor.name.removeprefix("blk.").partition(".")
        own = (f"blk.*.{rest}", layer) if tensor.name.startswith("blk.") else (tensor.name, "")
        key = (own[0], tensor.shape, tensor.source, tensor.asked, tensor.type, tensor.bytes)
        alike.setdefault(key, []).append(own[1])
    lines = ["| tensor | layers | shape | from | asked | becomes | bytes each |", "|---|---|---|---|---|---|---|"]
    for (name, shape, source, asked, type_, size), layers in alike.items():
        shown = "all" if len(layers) == max(map(len, alike.values())) > 1 else ", ".join(layers)
        becomes = f"**{type_}**" if asked != type_ else type_
        lines.append(f"| {name} | {shown} | {' x '.join(map(str, shape))} | {source} | {asked} | {becomes} | {size} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the size of the file that each kind makes of a model, to the byte but for this project's provenance."""
    from tasks.gguf.convert import converting  # noqa: PLC0415 - which needs this module

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path, help="a model directory in Hugging Face's layout, or a 16-bit GGUF")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--embedding-type", choices=list(TYPES), metavar="TYPE")
    parser.add_argument("--output-type", choices=list(TYPES), metavar="TYPE")
    parser.add_argument("--tensors", action="store_true", help="what becomes of every tensor, too")
    parser.add_argument("--name", default="stillhouse", help="general.name, which is in the file")
    arguments = parser.parse_args()
    options = {"embedding_type": arguments.embedding_type, "output_type": arguments.output_type}
    with tempfile.TemporaryDirectory() as work:
        try:
            with converting(arguments.model, arguments.name, Job(Path(work))) as conversion:
                plans = all_sizes(conversion.skeleton, arguments.kinds, **options)
        except StageError as error:
            sys.exit(f"plan: {error}")
    print(markdown(plans))
    if arguments.tensors:
        print(*(f"\n{plan.wanted.kind}\n\n{tensors_markdown(plan)}" for plan in plans), sep="\n")


if __name__ == "__main__":
    main()

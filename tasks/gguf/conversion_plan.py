"""The plan: what every tensor of a kind becomes and how many bytes the file will have, before anything is written.

python -m tasks.gguf.conversion_plan MODEL_DIR [--kinds Q8_0 Q4_K_M] [--embedding-type Q4_0] [--output-type Q6_K]
    [--outliers DIR] [--budget-mb 120]
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.errors import StageError
from tasks.core.job import Job
from tasks.engine.runtimes.ggml_types import FLOATS, TYPES, tensor_bytes
from tasks.gguf import GgufConfig
from tasks.gguf.header import TensorInfo, file_bytes, pack_text, pack_uint32
from tasks.gguf.imatrix import read_imatrix
from tasks.gguf.kinds import IGNORE_IMATRIX, KINDS, NEED_IMATRIX
from tasks.gguf.roles import layer_order, role
from tasks.gguf.sensitive import Raise, sentence
from tasks.gguf.tensor_types import Wanted, choose


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
    """A file before it is written: its tensors in their order, and its size in bytes.

    `advice` are better types for tensors that the outliers stage calls sensitive; where `raised` they are in `tensors`.
    """

    wanted: Wanted
    tensors: list[Planned]
    bytes: int
    texts: dict[str, str]
    imatrix: Path | None = None
    advice: tuple[Raise, ...] = ()
    raised: bool = False

    @property
    def fell_back(self) -> list[Planned]:
        """The tensors that get another type than the mixture wanted."""
        return [tensor for tensor in self.tensors if tensor.fell_back]

    @property
    def types(self) -> dict[str, int]:
        """How many tensors have which type."""
        return dict(sorted(Counter(tensor.type for tensor in self.tensors).items()))

    @property
    def weighed(self) -> list[Planned]:
        """The tensors whose rounding the importance matrix weighs."""
        known = read_imatrix(self.imatrix).weights if self.imatrix else {}
        return [tensor for tensor in self.tensors if tensor.name in known and tensor.type not in IGNORE_IMATRIX]

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
        if self.advice and self.raised:
            head += f"; sensitive tensors raised: {sentence(self.advice)}"
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


def main() -> None:
    """Prints the size of the file that each kind makes of a model, to the byte but for this project's provenance."""
    from tasks.gguf.convert import converting  # noqa: PLC0415
    from tasks.gguf.kind_choice import advised  # noqa: PLC0415 - which need this module
    from tasks.gguf.plan_page import markdown, tensors_markdown  # noqa: PLC0415

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path, help="a model directory in Hugging Face's layout, or a 16-bit GGUF")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--embedding-type", choices=list(TYPES), metavar="TYPE")
    parser.add_argument("--output-type", choices=list(TYPES), metavar="TYPE")
    parser.add_argument("--tensors", action="store_true", help="what becomes of every tensor, too")
    parser.add_argument("--name", default="stillhouse", help="general.name, which is in the file")
    parser.add_argument("--outliers", type=Path, metavar="DIR", help="that stage's output: which tensors to raise")
    parser.add_argument("--budget-mb", type=float, metavar="MB", help="what they may fill; else 5 percent more")
    arguments = parser.parse_args()
    options = {"embedding_type": arguments.embedding_type, "output_type": arguments.output_type}
    with tempfile.TemporaryDirectory() as work:
        try:
            with converting(arguments.model, arguments.name, Job(Path(work))) as conversion:
                plans = all_sizes(conversion.skeleton, arguments.kinds, **options)
                config = GgufConfig(kind="Q8_0", budget_mb=arguments.budget_mb)
                plans = [advised(config, plan, conversion.skeleton, arguments.outliers) for plan in plans]
        except StageError as error:
            sys.exit(f"plan: {error}")
    print(markdown(plans))
    for plan in plans:
        if plan.advice:
            print(f"\n{plan.wanted.kind}, raised by the verdict: {sentence(plan.advice)}")
            print(f"  overrides: {json.dumps(dict(step.override for step in plan.advice))}")
    if arguments.tensors:
        print(*(f"\n{plan.wanted.kind}\n\n{tensors_markdown(plan)}" for plan in plans), sep="\n")


if __name__ == "__main__":
    main()

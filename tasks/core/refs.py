"""Typed references to artifacts, which tasks pass to each other: kilobytes of JSON, never tensors, rows or paths."""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

Fact = str | int | float | bool


class _Ref(BaseModel):
    """An artifact in the store.

    `uri` is the store that holds it (`file:///...` or `s3://bucket/prefix`); `digest` the sha256 of its manifest
    (64 hex digits); `facts` a few numbers worth showing, which never decide what the artifact is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    facts: dict[str, Fact] = {}


class FilesRef(_Ref):
    """A user's own files, stored unchanged."""

    kind: Literal["files"] = "files"


class DatasetRef(_Ref):
    """`train.jsonl`, `validation.jsonl`, `test.jsonl`: checked rows in canonical form (see tasks/ingest)."""

    kind: Literal["dataset"] = "dataset"


class ModelRef(_Ref):
    """A complete model directory in Hugging Face's layout: config, safetensors, tokenizer."""

    kind: Literal["model"] = "model"


class AdapterRef(_Ref):
    """A PEFT adapter directory and the model that it adapts."""

    kind: Literal["adapter"] = "adapter"
    base: ModelRef


class GgufRef(_Ref):
    """One `model.gguf` and the evidence that llama.cpp reads it as Hugging Face does."""

    kind: Literal["gguf"] = "gguf"


class ReportRef(_Ref):
    """Numbers and charts about other artifacts."""

    kind: Literal["report"] = "report"


OutputRef = DatasetRef | ModelRef | AdapterRef | GgufRef | ReportRef
Ref = Annotated[FilesRef | OutputRef, Field(discriminator="kind")]
AnyModel = ModelRef | AdapterRef


class ModelDir(NamedTuple):
    """A model on disk: a base directory and, for a PEFT adapter, the adapter's directory.

    Written `BASE` or `BASE+ADAPTER` on a stage's command line, as mergekit does.
    """

    base: Path
    adapter: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelDir":
        """The inverse of `str`; a directory that exists under the whole text is a base, `+` in its name or not."""
        if Path(text).is_dir() or "+" not in text:
            return cls(Path(text))
        base, _, adapter = text.rpartition("+")
        return cls(Path(base), Path(adapter))

    def __str__(self) -> str:
        return f"{self.base}+{self.adapter}" if self.adapter else str(self.base)

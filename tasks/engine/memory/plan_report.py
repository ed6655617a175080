"""A memory plan's candidates and its choice: as a log line, a table, JSON, and files of the stage's report."""

import json
from pathlib import Path
from typing import NamedTuple

from tasks.engine.memory.predict import MemoryParts


class Candidate(NamedTuple):
    """Settings that a run could have, the memory they need, and the relative time of a step with them."""

    micro_batch: int
    tokens: int
    recompute: bool
    optimizer: str
    parts: MemoryParts
    cost: float

    def fits(self, gib: float) -> bool:
        """Whether a card with `gib` GiB to use holds it."""
        return self.parts.card <= gib

    def describe(self) -> str:
        """The settings and the memory that they need, in words."""
        recompute = "with" if self.recompute else "without"
        rows = f"micro-batch {self.micro_batch} ({self.tokens} tokens), {recompute} recompute, {self.optimizer}"
        return f"{rows}: {self.parts.card:.1f} GiB of the card, {self.parts.peak:.1f} in tensors"


class MemoryPlan(NamedTuple):
    """The candidates for a card of `gib` GiB, and the fastest of those that fit."""

    gib: float
    chosen: Candidate
    candidates: list[Candidate]

    def document(self) -> dict[str, object]:
        """The plan as JSON."""
        rows = [
            {**candidate._asdict(), "parts": {k: round(v, 3) for k, v in candidate.parts.table().items()}}
            for candidate in self.candidates
        ]
        return {"card_gib": round(self.gib, 2), "chosen": self.candidates.index(self.chosen), "candidates": rows}

    def markdown(self) -> str:
        """The plan as a table in Markdown."""
        names = list(self.chosen.parts.table())
        head = ["micro-batch", "tokens", "recompute", "optimizer", *names, "fits"]
        lines = [
            f"# Memory plan for {self.gib:.1f} GiB\n",
            "All in GiB. `peak` is what torch allocates, `card` what the card must have.\n",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
        ]
        for candidate in self.candidates:
            numbers = [f"{value:.2f}" for value in candidate.parts.table().values()]
            fits = "**chosen**" if candidate is self.chosen else "yes" if candidate.fits(self.gib) else "no"
            recompute = "yes" if candidate.recompute else "no"
            cells = [str(candidate.micro_batch), str(candidate.tokens), recompute, candidate.optimizer]
            lines.append("| " + " | ".join([*cells, *numbers, fits]) + " |")
        return "\n".join(lines) + "\n"

    def summary(self) -> dict[str, object]:
        """The plan's entry in report.json."""
        return {"predicted_gib": round(self.chosen.parts.peak, 2), "file": "memory_plan"}

    def write(self, out: Path) -> None:
        """Writes memory_plan.md and memory_plan.json into the stage's report."""
        (out / "report").mkdir(exist_ok=True)
        (out / "report" / "memory_plan.md").write_text(self.markdown(), encoding="utf-8")
        (out / "report" / "memory_plan.json").write_text(json.dumps(self.document(), indent=1), encoding="utf-8")

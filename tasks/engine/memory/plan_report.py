"""What the memory plan looked at and what it chose, told as a line, a table, a document and files of the report."""

import json
from pathlib import Path
from typing import NamedTuple

from tasks.engine.memory.predict import Parts


class Choice(NamedTuple):
    """One way to run: its settings, what it needs, and about how long a step takes beside the others."""

    micro_batch: int
    tokens: int
    recompute: bool
    optimizer: str
    parts: Parts
    cost: float

    def fits(self, gib: float) -> bool:
        """Whether a card with so much to give holds it."""
        return self.parts.card <= gib

    def say(self) -> str:
        """In words."""
        recompute = "with" if self.recompute else "without"
        rows = f"micro-batch {self.micro_batch} ({self.tokens} tokens), {recompute} recompute, {self.optimizer}"
        return f"{rows}: {self.parts.card:.1f} GiB of the card, {self.parts.peak:.1f} in tensors"


class MemoryPlan(NamedTuple):
    """All that was looked at, and what was chosen."""

    gib: float
    chosen: Choice
    looked_at: list[Choice]

    def document(self) -> dict[str, object]:
        """As it goes into the report."""
        rows = [
            {**choice._asdict(), "parts": {k: round(v, 3) for k, v in choice.parts.table().items()}}
            for choice in self.looked_at
        ]
        return {"card_gib": round(self.gib, 2), "chosen": self.looked_at.index(self.chosen), "looked_at": rows}

    def page(self) -> str:
        """As a table to read."""
        names = list(self.chosen.parts.table())
        head = ["micro-batch", "tokens", "recompute", "optimizer", *names, "fits"]
        lines = [
            f"# Memory plan for {self.gib:.1f} GiB\n",
            "All in GiB. `peak` is what torch allocates, `card` what the card must have.\n",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
        ]
        for choice in self.looked_at:
            numbers = [f"{value:.2f}" for value in choice.parts.table().values()]
            mark = "**chosen**" if choice is self.chosen else "yes" if choice.fits(self.gib) else "no"
            cells = [str(choice.micro_batch), str(choice.tokens), "yes" if choice.recompute else "no", choice.optimizer]
            lines.append("| " + " | ".join([*cells, *numbers, mark]) + " |")
        return "\n".join(lines) + "\n"

    def told(self) -> dict[str, object]:
        """As it goes into report.json."""
        return {"predicted_gib": round(self.chosen.parts.peak, 2), "file": "memory_plan"}

    def write(self, out: Path) -> None:
        """Into the stage's report."""
        (out / "report").mkdir(exist_ok=True)
        (out / "report" / "memory_plan.md").write_text(self.page(), encoding="utf-8")
        (out / "report" / "memory_plan.json").write_text(json.dumps(self.document(), indent=1), encoding="utf-8")

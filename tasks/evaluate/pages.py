"""The evaluation's report for people: the first wrong answers as a page, the confusion of intents as a picture."""

from pathlib import Path
from typing import Any

LONGEST = 600
"""Characters of a prompt or an answer that the page shows."""


def write_mistakes(predictions: list[dict[str, Any]], limit: int, path: Path) -> None:
    """The first `limit` rows that are no exact match, each with its prompt, the expected answer and the model's."""
    wrong = [row for row in predictions if not row["exact_match"]]
    lines = ["# Wrong answers", "", f"{len(wrong)} of {len(predictions)} answers are no exact match."]
    for row in wrong[:limit]:
        lines += ["", f"## Row {row['row']}", "", _block(row["prompt"]), "", "Expected", "", _block(row["expected"])]
        lines += ["", "Given", "", _block(row["answer"])]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def plot_confusion(confusion: dict[str, dict[str, int]], path: Path) -> None:
    """Expected intents as rows, predicted ones as columns; predictions that are never expected come last."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (free-text runs need no picture)

    rows = list(confusion)
    columns = rows + sorted({predicted for counts in confusion.values() for predicted in counts} - set(rows))[:20]
    counts = [[confusion[row].get(column, 0) for column in columns] for row in rows]
    figure = Figure(figsize=(3 + 0.5 * len(columns), 2.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(counts, cmap="Blues", aspect="auto")
    figure.colorbar(image, ax=axes, label="rows")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(title="Intents: expected and given", xlabel="given", ylabel="expected")
    top = max(map(max, counts))
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count:
                axes.text(x, y, str(count), ha="center", va="center", color="white" if 2 * count > top else "black")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _block(text: str) -> str:
    """Indented, so that nothing in an answer is taken for Markdown."""
    excerpt = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    return "\n".join("    " + line for line in (excerpt or "(nothing)").splitlines())

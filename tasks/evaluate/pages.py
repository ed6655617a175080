"""The evaluation's report for people: the first wrong answers as a page, the confusion of intents as a picture."""

from pathlib import Path
from typing import Any

from tasks.core.plain_text import literal_text, single_line, visible

LONGEST = 600
"""Characters of a prompt or an answer that the page shows."""
MAX_INTENTS = 60
LABEL = 32
"""Characters of an intent's name in the picture."""


def write_mistakes(predictions: list[dict[str, Any]], limit: int, path: Path) -> None:
    """The first `limit` rows that are no exact match, each with its prompt, the expected answer and the model's."""
    wrong = [row for row in predictions if not row["exact_match"]]
    lines = ["# Wrong answers", "", f"{len(wrong)} of {len(predictions)} answers are no exact match."]
    if cut := sum(bool(row.get("cut")) for row in predictions):
        lines[-1] += f" {cut} were cut at max_new_tokens before they ended."
    for row in wrong[:limit]:
        lines += ["", f"## Row {row['row']}", "", _block(row["prompt"]), "", "Expected", "", _block(row["expected"])]
        lines += ["", "Given, cut at max_new_tokens" if row.get("cut") else "Given", "", _block(row["answer"])]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def plot_confusion(confusion: dict[str, dict[str, int]], path: Path) -> None:
    """Expected intents as rows, predicted ones as columns; predictions that are never expected come last.

    Of more than MAX_INTENTS, those with the most rows: a picture has an end, scores.json has all.
    """
    most = sorted(confusion, key=lambda name: -sum(confusion[name].values()))[:MAX_INTENTS]
    rows = [name for name in confusion if name in set(most)]
    other = {predicted for name in rows for predicted in confusion[name]} - set(rows)
    with literal_text():
        _plot({name: confusion[name] for name in rows}, rows + sorted(other)[:20], path)


def _plot(confusion: dict[str, dict[str, int]], columns: list[str], path: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  (free-text runs need no picture)

    rows = list(confusion)
    counts = [[confusion[row].get(column, 0) for column in columns] for row in rows]
    figure = Figure(figsize=(4 + 0.5 * len(columns), 2.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(counts, cmap="Blues", aspect="auto")
    figure.colorbar(image, ax=axes, label="rows")
    axes.set_xticks(range(len(columns)), [single_line(name, LABEL) for name in columns], rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [single_line(name, LABEL) for name in rows])
    axes.set(title="Intents: expected and given", xlabel="given", ylabel="expected")
    top = max(map(max, counts))
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count:
                axes.text(x, y, str(count), ha="center", va="center", color="white" if 2 * count > top else "black")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _block(text: str) -> str:
    """Indented, so that nothing in an answer is taken for Markdown; control characters are shown."""
    excerpt = visible(text if len(text) <= LONGEST else text[:LONGEST] + " ...")
    return "\n".join("    " + line for line in (excerpt or "(nothing)").split("\n"))

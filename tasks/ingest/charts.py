"""Charts of the profile: rows of each intent, lengths in characters, lengths in tokens against the limit."""

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.plain_text import literal_text, single_line
from tasks.ingest.profile import SPLITS, Profile
from tasks.ingest.tokens import TokenLengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#33658a", "#86bbd8", "#f6ae2d")
BINS = 40
MAX_INTENTS = 40
LABEL = 42  # characters of an intent's name


def draw_charts(profile: Profile, characters: dict[str, dict[int, int]], report: Path) -> None:
    """Writes lengths.png, and intents.png where there are intents."""
    with literal_text():
        _draw(profile, characters, report)


def _draw(profile: Profile, characters: dict[str, dict[int, int]], report: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  (a second that a stage which fails early should not cost)

    count = 2 + (profile.tokens is not None)
    figure = Figure(figsize=(4.5 * count, 3.5))
    panels = figure.subplots(1, count)
    # By hand: matplotlib's own layouts draw everything twice, and that took most of a small run's time.
    figure.subplots_adjust(left=0.8 / (4.5 * count), right=0.98, bottom=0.16, top=0.9, wspace=0.3)
    for axes, (name, counts) in zip(panels, characters.items(), strict=False):
        low, high = min(counts), max(counts)
        step = -(-(high - low + 1) // BINS)  # a whole number, or bins would hold different numbers of lengths
        bins = list(range(low, high + step + 1, step))
        axes.hist(list(counts), bins=bins, weights=list(counts.values()), color=COLORS[0])
        axes.set(title=f"Length of the {name}", xlabel="characters", ylabel="rows")
    if profile.tokens is not None:
        _tokens(panels[2], profile.tokens)
    figure.savefig(report / "lengths.png", dpi=110, metadata={"Software": None})
    if profile.intents["train"]:
        names = sorted(profile.intents["train"], key=lambda name: profile.intents["train"][name])[-MAX_INTENTS:]
        height = 1.2 + 0.3 * len(names)
        figure = Figure(figsize=(8, height))
        _intents(figure.subplots(), profile, names)
        left = 0.6 + 0.08 * min(LABEL, max(map(len, names)))
        figure.subplots_adjust(left=left / 8, right=0.98, bottom=0.6 / height, top=1 - 0.4 / height)
        figure.savefig(report / "intents.png", dpi=110, metadata={"Software": None})


def _tokens(axes: "Axes", tokens: TokenLengths) -> None:
    starts = [index * tokens.bin for index in range(len(tokens.histogram))]
    axes.bar(starts, tokens.histogram, width=tokens.bin, align="edge", color=COLORS[0])
    # The limit is drawn where rows come near it; far beyond them it would press them into a corner.
    if tokens.max_length < 2 * tokens.p100:
        axes.axvline(tokens.max_length, color=COLORS[2], label=f"max_length {tokens.max_length}")
        axes.legend()
    axes.set(title=f"Tokens of {tokens.sampled} rows", xlabel=f"tokens (max_length {tokens.max_length})", ylabel="rows")


def _intents(axes: "Axes", profile: Profile, names: list[str]) -> None:
    left = [0] * len(names)
    for split, color in zip(SPLITS, COLORS, strict=True):
        counts = [profile.intents[split].get(name, 0) for name in names]
        axes.barh(range(len(names)), counts, left=left, label=split, color=color)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    axes.set_yticks(range(len(names)), [single_line(name, LABEL) for name in names])
    axes.set(title="Rows of each intent", xlabel="rows", ylabel="intent")
    axes.legend()

"""Text of data and models is shown as it is: no terminal escape, Markdown or mathtext in it does anything."""

import io
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from tasks.core.job import Job
from tasks.core.plain_text import literal_text, markdown, single_line, visible

HOSTILE = [
    "fee_$5_to_$", r"$\frac{$", "a|b|c", "`rm`", "**bold** _em_ __init__", "<b>x</b> <script>", "[a](https://x.y)",
    "# head", "- item", "\x1b[31mred\x1b[0m", "two\nlines\r\nthree", "\ud800", "www.x.y", "&lt;", "a\\", "~~gone~~",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_renders_to_the_text_itself(text: str) -> None:
    html = (
        MarkdownIt("commonmark").enable("table").enable("strikethrough").render(f"| a |\n|---|\n| {markdown(text)} |")
    )
    body = html[html.index("<td>") + 4 : html.index("</td>")]
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        body = body.replace(entity, character)
    assert body == single_line(text).strip() and html.count("<td>") == 1


def test_no_control_character_is_left() -> None:
    shown = visible("\x1b]0;title\x07\x9b31m \u202eabc\ud83d\x00\tq\nnext")
    assert shown == "\\x1b]0;title\\x07\\x9b31m \\u202eabc\\ud83d\\x00\tq\nnext"
    assert visible("Größe 図 ไทย 👩‍🔧 שלום") == "Größe 図 ไทย 👩‍🔧 שלום"
    assert single_line("a" * 50, 10) == "a" * 9 + "…"


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_mathtext(text: str) -> None:
    with literal_text():
        figure = Figure()
        axes = figure.subplots()
        axes.set_xticks([0], [single_line(text)])
        axes.set(title=single_line(text))
        figure.savefig(io.BytesIO())
        assert not axes.title.get_parse_math()


def test_log_lines_on_the_terminal_hold_no_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(tmp_path, bar=True)
    job.log("answer \x1b[2J[red]x[/red]")
    assert capsys.readouterr().err == "answer \\x1b[2J[red]x[/red]\n"

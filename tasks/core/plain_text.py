r"""Text of data and models, made safe to show: never a terminal escape, Markdown, HTML or matplotlib's mathtext.

markdown("fee_$5 | <b>")     # "fee\_\$5 \| \<b\>"; HTML pages escape by themselves (`html.escape`, Jinja)
with literal_text(): ...     # everything that matplotlib draws and saves in this block
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# C0 and C1 but tab and line feed, line and paragraph separators, overrides of writing direction, half surrogate pairs.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MARKDOWN = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])|^\s*[#+-](?!\s*$)|(?<=www)\.|:(?=//)")


def visible(text: str) -> str:
    r"""Control characters and lone surrogates as escapes (`\x1b`), so that a terminal obeys none; line ends stay."""
    return INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def single_line(text: str, limit: int | None = None) -> str:
    """`visible`, with line ends and tabs as blanks, and cut to `limit` characters with an ellipsis."""
    line = re.sub(r"[\n\t]+", " ", visible(text))
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


def markdown(text: object) -> str:
    """A single line for a paragraph, a list item or a table's cell, in which nothing is markup."""
    return MARKDOWN.sub(lambda match: match[0][:-1] + "\\" + match[0][-1], single_line(str(text)))


@contextmanager
def literal_text() -> Iterator[None]:
    """matplotlib draws every text of this block as it is written: `$` is no mathtext. Saving belongs into the block."""
    from matplotlib import rc_context  # noqa: PLC0415 - flows import this module

    with rc_context({"text.parse_math": False, "text.usetex": False}):
        yield

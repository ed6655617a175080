"""The table of docs/data.md of the fields that common formats know, and what becomes of each.

python -m tests.ingest.fields            # prints it
python -m tests.ingest.fields --write    # writes it to docs/data.md
"""

import sys

from tasks.ingest.row_fields import FIELDS
from tasks.ingest.row_shapes import FOREIGN_FORMATS
from tests.ingest.faults import PAGE

START, END = "<!-- fields: python -m tests.ingest.fields --write -->", "<!-- end of fields -->"
PLACES = {"row": "rows", "message": "messages", "both": "rows and messages"}


def table() -> str:
    """The fields by their use, and the formats that are recognised and not read, as Markdown."""
    lines = ["| field | of | known from | what becomes of it |", "|---|---|---|---|"]
    for field in FIELDS:
        names = ", ".join(f"`{name}`" for name in field.names.split())
        lines.append(f"| {names} | {PLACES[field.place]} | {field.formats} | {field.use.value} |")
    lines += ["", "| rows with | are | remedy |", "|---|---|---|"]
    for fields, tool, remedy in FOREIGN_FORMATS:
        lines.append(f"| {', '.join(f'`{name}`' for name in sorted(fields))} | {tool} | {remedy} |")
    return "\n".join(lines)


if __name__ == "__main__":
    markdown = table()
    print(markdown)
    if "--write" in sys.argv:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.partition(START)[0], page.partition(END)[2]
        PAGE.write_text(f"{before}{START}\n\n{markdown}\n\n{END}{after}", encoding="utf-8")

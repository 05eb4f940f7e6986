"""The table of families in docs/checkpoints.md, made from the one in the code."""

from pipeline.models.families import FORMATS, TEXT_FORMATS
from pipeline.models.formats.format import Format
from pipeline.models.text_architecture import TextFormat

TABLE_START, TABLE_END = "<!-- table: pipeline/models/families.py -->", "<!-- end of table -->"


def markdown_table() -> str:
    """The families as a Markdown table: what loads, from which layout, and the test that holds it."""
    lines = ["| family | layout | such as | held by |", "| --- | --- | --- | --- |"]
    rows: list[Format | TextFormat] = [*FORMATS, *TEXT_FORMATS]
    for row in rows:
        lines.append(f"| {row.family} | {row.layout} | {row.examples} | `{row.test}` |")
    return "\n".join(lines)


def update_page(page: str) -> str:
    """`page` with its table between the two markers replaced by the current one."""
    head, _, rest = page.partition(TABLE_START)
    return f"{head}{TABLE_START}\n{markdown_table()}\n{TABLE_END}{rest.partition(TABLE_END)[2]}"

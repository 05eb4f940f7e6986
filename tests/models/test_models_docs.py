"""docs/checkpoints.md says what the code's own table says, and each row's test is there."""

from pathlib import Path

from support.families_table import update_page

from pipeline.models.families import FORMATS

REPOSITORY = Path(__file__).resolve().parents[2]


def test_page_has_the_current_table() -> None:
    page = (REPOSITORY / "docs" / "checkpoints.md").read_text()
    assert page == update_page(page), "write it anew with support.families_table.update_page"


def test_every_row_names_a_test_that_exists() -> None:
    for row in FORMATS:
        assert (REPOSITORY / row.test).is_file(), row


def test_rows_differ() -> None:
    assert len({(row.family, row.layout) for row in FORMATS}) == len(FORMATS)

"""Quotes in CSV and TSV that do not end, or do not enclose; numbers that are identifiers."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.source_rows import read

from pipeline.sources import text
from schemas.errors import SourceError


def rows(path: Path, content: str) -> list[dict[str, Any]]:
    path.write_text(content, newline="")
    table = read(path)
    table = table.drop_columns(list(table.column_names[1:7]))
    cut = [uri.removeprefix(f"{path.parent}/") for uri in table["uri"].to_pylist()]
    found: list[dict[str, Any]] = table.set_column(0, "uri", pa.array(cut)).to_pylist()
    return found


MANY = "".join(f'{number:06d}.jpg,"a caption, {number}",{number}\n' for number in range(3000))


@pytest.fixture(params=[4 << 20, 4 << 10])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How much is read at a time: all of it, or little."""
    monkeypatch.setattr(text, "_BLOCK_BYTES", request.param)
    size: int = request.param
    return size


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('uri,caption\na.jpg,"foo\nb.jpg,bar\nc.jpg,baz\n', 2),
        ('uri,caption\na.jpg,"two\nlines"\nb.jpg,"foo', 4),
        ('"uri","caption"\r\na.jpg,"foo ""bar"""\r\nb.jpg,"foo""\r\n', 3),
        ('uri,caption\n"a.jpg"x,"y"\n"b.jpg,z\n', 3),
        (f'uri,caption,n\n{MANY}last.jpg,"foo,1\n', 3002),
        (f'uri,caption,n\nfirst.jpg,"foo,1\n{MANY.replace(chr(34), "")}', 2),
    ],
)
def test_a_quote_that_nothing_closes_is_an_error(tmp_path: Path, content: str, line: int) -> None:
    with pytest.raises(SourceError, match=rf"t\.csv, line {line}: nothing closes the quote"):
        rows(tmp_path / "t.csv", content)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_quotes_that_enclose_values(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    mark = "," if name == "t.csv" else "\t"
    given = ["a.jpg", f"one{mark} two", 'say "it"', "", 'no"quote', "it's", '""']
    lines = [f'{number}.jpg{mark}"{value.replace(chr(34), chr(34) * 2)}"\n' for number, value in enumerate(given)]
    found = rows(tmp_path / name, f'uri{mark}"caption"\n' + "".join(lines * 500))
    assert [row["caption"] for row in found] == given * 500
    assert caplog.text == ""


@pytest.mark.usefixtures("block_bytes")
def test_values_over_several_lines_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = f'uri,caption,n\n{MANY}a.jpg,"foo\nbar",1\nb.jpg,x,2\nc.jpg,"\n",3\n'
    assert rows(tmp_path / "t.csv", content)[-3:] == [
        {"uri": "a.jpg", "caption": "foo\nbar", "n": 1},
        {"uri": "b.jpg", "caption": "x", "n": 2},
        {"uri": "c.jpg", "caption": "\n", "n": 3},
    ]
    assert "t.csv: in 2 rows (the first is row 3,001) a value in quotes spans several lines" in caplog.text


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("more", ["", "".join(f'{number}.jpg\t"x"\t{number}\n' for number in range(3000))])
def test_quotes_in_a_tsv_are_characters_unless_they_enclose_values(tmp_path: Path, more: str) -> None:
    content = 'a\t"Foo" and\t1\nb\t"Bar\t2\nc\tbaz\t3\nd\t"qux"\t4\ne\tx\t5\n'
    found = rows(tmp_path / "t.tsv", f"uri\tcaption\tn\n{content}{more}")
    assert [row["caption"] for row in found][:5] == ['"Foo" and', '"Bar', "baz", '"qux"', "x"]
    assert [row["n"] for row in found] == [1, 2, 3, 4, 5, *range(len(more.splitlines()))]
    assert {row["caption"] for row in found[5:]} <= {'"x"'}
    assert rows(tmp_path / "u.tsv", 'uri\tcaption\na\t"Bar\n') == [{"uri": "a", "caption": '"Bar'}]


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("numbers", [["000139", "7"], ["7", "007"], ["1", '"00"'], ["", "01"], ["9" * 12, " 07"]])
@pytest.mark.parametrize("many", [0, 3000])
def test_numbers_that_begin_with_a_zero_are_text(tmp_path: Path, numbers: list[str], many: int) -> None:
    numbers = ["5"] * many + numbers
    lines = [f"{number},{place}.jpg,{number},{place},{place}.5\n" for place, number in enumerate(numbers)]
    found = rows(tmp_path / "t.csv", "first,uri,id,n,score\n" + "".join(lines))
    texts = [number.strip('"') for number in numbers]
    assert [row["id"] for row in found] == [row["first"] for row in found] == texts
    assert [row["n"] for row in found] == list(range(len(numbers)))
    assert found[0]["score"] == 0.5


def test_a_zero_alone_is_a_number(tmp_path: Path) -> None:
    found = rows(tmp_path / "t.csv", "uri,a,b,c\n007.jpg,0,0.5,00:10:00\n08.jpg,10,0,00:20:00\n")
    assert [(row["a"], row["b"]) for row in found] == [(0, 0.5), (10, 0.0)]

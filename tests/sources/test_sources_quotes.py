"""Quotes in CSV and TSV that do not end, or do not enclose; numbers that are identifiers."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.source_rows import read

from pipeline.sources import delimited
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
    monkeypatch.setattr(delimited, "_BLOCK_BYTES", request.param)
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
    with pytest.raises(
        SourceError, match=rf"t\.csv, line {line}: a quoted value in the row that starts here is never closed"
    ):
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


MORE = "".join(f'{number}.jpg\t"caption {number}"\n' for number in range(3000))


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("more", ["", MORE])
@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ('"uri"\t"caption"\n{}"a.jpg"\t"say \\"hi\\" you"\n', 'say \\hi\\" you"'),
        ('uri\t"caption"\n"a.jpg"\t"foo" bar\n{}', "foo bar"),
    ],
)
def test_one_odd_value_does_not_make_all_quotes_of_a_tsv_characters(
    tmp_path: Path, content: str, caption: str, more: str
) -> None:
    found = {row["uri"]: row["caption"] for row in rows(tmp_path / "t.tsv", content.format(more))}
    assert found.pop("a.jpg") == caption
    assert found == {f"{number}.jpg": f"caption {number}" for number in range(len(more.splitlines()))}


@pytest.mark.usefixtures("block_bytes")
def test_a_tsv_whose_quotes_enclose_may_not_leave_one_open(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"t\.tsv, line 3002: a quoted value in the row that starts here"):
        rows(tmp_path / "t.tsv", f'"uri"\tcaption\n{MORE}a.jpg\t"foo\n')


@pytest.mark.usefixtures("block_bytes")
def test_quotes_that_enclose_values_are_told_where_they_are_characters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    swallowing = 'a.jpg\t"Bar\nb.jpg\tbaz"\nc.jpg\t"Foo" and\n'
    found = rows(tmp_path / "t.tsv", f"uri\tcaption\n{swallowing}")
    assert [row["caption"] for row in found] == ['"Bar', 'baz"', '"Foo" and']
    caplog.clear()
    found = rows(tmp_path / "t.tsv", f'uri\tcaption\n{MORE}a.jpg\t"Foo" and\n')
    assert [row["caption"] for row in found[-2:]] == ['"caption 2999"', '"Foo" and']
    (record,) = caplog.records
    assert "t.tsv: quotes are read as part of the values, also where they enclose whole ones" in record.message
    assert "because in the row that begins in line 3,002 one does not" in record.message
    caplog.clear()
    rows(tmp_path / "t.tsv", 'uri\tcaption\na.jpg\t"Foo" and\n')
    assert not caplog.records


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize(
    "numbers",
    [
        *(["000139", "7"], ["7", "007"], ["1", '"00"'], ["", "01"], ["9" * 12, " 07"]),
        *(["02134  "], ["007 "], ["\t007"], [" 007\t"], ['"007 "'], ['" 007 "'], ["007 ", "7"]),
        *(["0x1f", "12"], ["5", "0XFFB1A2C3D4E5F607"], ["-007", "1"]),
    ],
)
@pytest.mark.parametrize("many", [0, 3000])
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_numbers_that_begin_with_a_zero_are_text(tmp_path: Path, numbers: list[str], many: int, end: str) -> None:
    numbers = ["5"] * many + numbers
    lines = [f"{number},{place}.jpg,{number},{place},{place}.5\n" for place, number in enumerate(numbers)]
    found = rows(tmp_path / "t.csv", ("first,uri,id,n,score\n" + "".join(lines)).replace("\n", end))
    texts = [number.strip('"') or None for number in numbers]
    assert [row["id"] for row in found] == [row["first"] for row in found] == texts
    assert [row["n"] for row in found] == list(range(len(numbers)))
    assert found[0]["score"] == 0.5


@pytest.mark.parametrize("end", [",", "\t"])
def test_what_is_missing_among_identifiers_is_missing(tmp_path: Path, end: str) -> None:
    content = "uri,code\na.jpg,01\nb.jpg,NA\nc.jpg,\nd.jpg,20\n".replace(",", end)
    found = rows(tmp_path / ("t.csv" if end == "," else "t.tsv"), content)
    assert [row["code"] for row in found] == ["01", None, None, "20"]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_lines_are_counted_whatever_ends_them(tmp_path: Path, end: str) -> None:
    content = f'uri,caption{end}{end}a,x{end}b,"two{end}lines"{end}c,"open{end}d,y{end}'
    with pytest.raises(SourceError, match=r"t\.csv, line 6: a quoted value in the row that starts here"):
        rows(tmp_path / "t.csv", content)


def test_a_zero_alone_is_a_number(tmp_path: Path) -> None:
    found = rows(tmp_path / "t.csv", "uri,a,b,c\n007.jpg,0,0.5,00:10:00\n08.jpg,10,0,00:20:00\n")
    assert [(row["a"], row["b"]) for row in found] == [(0, 0.5), (10, 0.0)]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
@pytest.mark.parametrize("mark", ["", '"'])
def test_a_value_may_be_longer_than_what_is_read_at_a_time(tmp_path: Path, name: str, mark: str) -> None:
    end = "," if name == "t.csv" else "\t"
    content = f'uri{end}text\n"a.jpg"{end}{mark}{"x" * (5 << 20)}{mark}\nb.jpg{end}"y"\n'
    assert [(row["uri"], len(row["text"])) for row in rows(tmp_path / name, content)] == [
        ("a.jpg", 5 << 20),
        ("b.jpg", 1),
    ]


def test_a_tsv_of_which_the_quotes_break_rows_says_what_would_help(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SourceError, match=r"t\.tsv cannot be read as TSV.* Expected 2 columns, got 3"):
        rows(tmp_path / "t.tsv", 'uri\tcaption\na.jpg\t"a\tb"\nb.jpg\t"foo" bar\n')
    assert "put the names in the header in quotes" in caplog.text

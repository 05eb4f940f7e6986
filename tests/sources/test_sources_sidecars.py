"""Which texts of a shard belong to which image where names have dots of their own."""

from pathlib import Path

import pytest
from support.shards import make_named_tar
from support.source_rows import read


def captions(path: Path, names: list[str]) -> dict[str, str | None]:
    """The `txt` of every image of a shard with these members; a text says which member it is."""
    make_named_tar(path, {name: name.encode() for name in names})
    table = read(path)
    images = [uri.removeprefix(f"{path}#") for uri in table["uri"].to_pylist()]
    return dict(zip(images, table["txt"].to_pylist(), strict=True))


@pytest.mark.parametrize("stem", ["IMG.", "2401.0", "d/v1.0_", "www.site.com_", "d.e/2024.01.0"])
def test_dots_in_names_mix_no_captions(tmp_path: Path, stem: str) -> None:
    names = [f"{stem}{number}" for number in (1, 2, 3)]
    expected: dict[str, str | None] = {f"{name}.png": f"{name}.txt" for name in names}
    together = [member for name in names for member in (f"{name}.png", f"{name}.txt")]
    assert captions(tmp_path / "a.tar", together) == expected
    assert captions(tmp_path / "b.tar", sorted(together, key=lambda member: member[-3:])) == expected
    without_second = [member for member in together if member != f"{names[1]}.txt"]
    assert captions(tmp_path / "c.tar", without_second) == expected | {f"{names[1]}.png": None}


def test_what_a_sample_shares_goes_behind_what_is_an_images_own(tmp_path: Path) -> None:
    names = ["1.left.png", "1.right.png", "1.right.txt", "1.txt", "1.png", "1.png.txt", "1.right.far.png"]
    assert captions(tmp_path / "a.tar", names) == {
        "1.left.png": "1.txt",
        "1.right.png": "1.right.txt",
        "1.png": "1.png.txt",
        "1.right.far.png": "1.txt",
    }


def test_each_kind_of_text_is_found_by_itself(tmp_path: Path) -> None:
    members = ["1.a.png", "1.a.TXT", "1.json", "1.cls", "1.b.cls", "1.b.png"]
    make_named_tar(tmp_path / "a.tar", {name: name.encode() for name in members})
    assert read(tmp_path / "a.tar").select(["json", "user_cls", "txt"]).to_pylist() == [
        {"json": "1.json", "user_cls": "1.cls", "txt": "1.a.TXT"},
        {"json": "1.json", "user_cls": "1.b.cls", "txt": None},
    ]


def test_a_sample_of_one_image_has_all_its_texts(tmp_path: Path) -> None:
    members = ["1.image.png", "1.caption.txt", "1.meta.json", "1.mask.npy", "2.kind.cls", "2.png", "2.txt", "2.old.txt"]
    make_named_tar(tmp_path / "a.tar", {name: name.encode() for name in members})
    assert read(tmp_path / "a.tar").select(["json", "user_cls", "txt"]).to_pylist() == [
        {"json": "1.meta.json", "user_cls": None, "txt": "1.caption.txt"},
        {"json": None, "user_cls": "2.kind.cls", "txt": "2.txt"},
    ]


def test_texts_that_are_too_large_to_ride_along_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"1.png": b"x", "1.json": bytes((1 << 20) + 1), "1.txt": b"t" * (1 << 20), "2.png": b"y"}
    for folder, cut in (("whole", None), ("broken", -(4 << 20))):  # the second breaks off in the last text
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "a.tar"
        make_named_tar(path, members | {"2.txt": bytes(2 << 20), "2.npy": bytes(2 << 20)})
        path.write_bytes(path.read_bytes()[:cut])
        caplog.clear()
        table = read(path)
        assert [len(text) if text else None for text in table["txt"].to_pylist()[:2]] == [1 << 20, None]
        assert table["uri"].to_pylist() == [f"{path}#1.png", f"{path}#2.png", *([str(path)] if cut else [])]
        assert "json" not in table.column_names
        read(path)
        (message,) = [text for text in caplog.messages if "MiB" in text]
        assert message.startswith(f"{path}: texts of more than 1 MiB beside images are left out, here 2, of which the")
        assert "first is 1.json" in message

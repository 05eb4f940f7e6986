"""Tars behind one another in a file, and members that are not one range of bytes."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from support.manifests import decode_all
from support.shards import listed, make_named_tar, png, shades
from support.source_rows import read

SHADES = {"1.png": 10, "2.png": 20, "3.png": 30}


@pytest.mark.parametrize("padding", [0, 512 * 21, 300_000 // 512 * 512])
def test_tars_behind_one_another_are_listed_to_the_end(tmp_path: Path, padding: int) -> None:
    whole = b""
    for name, shade in SHADES.items():
        make_named_tar(tmp_path / "part", {name: png(shade)})
        whole += (tmp_path / "part").read_bytes() + bytes(padding)
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    manifest = listed(str(path))
    assert manifest["uri"].to_pylist() == [f"{path}#{name}" for name in SHADES]
    assert shades(decode_all(manifest)) == list(SHADES.values())


def test_an_empty_tar_in_front_hides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    make_named_tar(path, {})
    make_named_tar(tmp_path / "part", {"1.png": png(1)})
    path.write_bytes(path.read_bytes() + (tmp_path / "part").read_bytes())
    assert read(path)["uri"].to_pylist() == [f"{path}#1.png"]


def test_a_sample_ends_where_its_tar_does(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.tar", b""
    for text in ("first", "second"):
        make_named_tar(tmp_path / "part", {"1.png": png(1), "1.txt": text.encode()})
        whole += (tmp_path / "part").read_bytes()
    path.write_bytes(whole)
    assert read(path)["txt"].to_pylist() == ["first", "second"]


def test_what_is_no_tar_behind_the_end_is_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.tar"
    make_named_tar(path, {"1.png": png(1)})
    end = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"no header " * 100)
    assert read(path)["uri"].to_pylist() == [f"{path}#1.png", str(path)]
    assert f"no valid header at byte {end:,}" in caplog.text


@pytest.mark.parametrize("padding", [0, 512, 700])
@pytest.mark.parametrize("behind", [b"\n", b"\r\n", b"no header " * 30])
def test_what_is_too_short_for_a_header_behind_the_end_is_told(
    tmp_path: Path, behind: bytes, padding: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.tar"
    make_named_tar(path, {"1.png": png(1)})
    end = path.stat().st_size + padding // 512 * 512
    path.write_bytes(path.read_bytes() + bytes(padding) + behind)
    assert read(path)["uri"].to_pylist() == [f"{path}#1.png"]
    assert f"x.tar: what is behind the end of the tar, at byte {end:,}, is too short for another one" in caplog.text


def test_global_headers_hold_up_to_the_end_of_their_tar(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for name, headers in (("first", {"path": "named.png"}), ("second", {})):
        make_named_tar(tmp_path / name, {"2.png": png(1)}, format=tarfile.PAX_FORMAT, pax_headers=headers)
    path.write_bytes((tmp_path / "first").read_bytes() + (tmp_path / "second").read_bytes())
    assert read(path)["uri"].to_pylist() == [f"{path}#named.png", f"{path}#2.png"]


@pytest.mark.parametrize("holes", [1, 9])
@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_sparse_member_says_so(tmp_path: Path, form: str, holes: int) -> None:
    names = ["1.png", f"{'sparse' * 20}.png", "3.png"]
    for name in names:
        with open(tmp_path / name, "wb") as file:
            file.write(png(7))
            for _ in range(holes):
                file.seek(1 << 18, os.SEEK_CUR)
                file.write(b"end")
    path = tmp_path / "x.tar"
    pack = ["tar", "--create", "--file", path, "--format", form, "--directory", tmp_path]
    subprocess.run([*pack, names[0]], check=True, timeout=60)
    pack[1] = "--append"
    subprocess.run([*pack, "--sparse", "--hole-detection=raw", names[1]], check=True, timeout=60)
    subprocess.run([*pack, names[2]], check=True, timeout=60)
    with tarfile.open(path) as shard:
        assert [member.issparse() for member in shard] == [False, True, False]
    table = decode_all(listed(str(path)))
    assert table["error"].to_pylist() == [None, "SparseMember", None]
    assert f"{names[1]} is a sparse file in {path}, not one range of bytes" in table["message"][1].as_py()


@pytest.mark.parametrize("in_front", [["1.png"], []])
@pytest.mark.parametrize("holes", [9, 99])
def test_a_shard_that_breaks_off_in_the_map_of_a_sparse_member(
    tmp_path: Path, holes: int, in_front: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "1.png").write_bytes(png(7))
    with open(tmp_path / "2.png", "wb") as file:
        for _ in range(holes):
            file.seek(1 << 18, os.SEEK_CUR)
            file.write(b"end")
    path = tmp_path / "x.tar"
    pack = ["tar", "--create", "--file", path, "--format", "posix", "--sparse", "--hole-detection=raw"]
    subprocess.run([*pack, "--directory", tmp_path, *in_front, "2.png"], check=True, timeout=60)
    with tarfile.open(path) as shard:
        end_of_map = shard.getmember("2.png").offset_data
    path.write_bytes(path.read_bytes()[: end_of_map - 500])
    assert read(path)["uri"].to_pylist() == [*(f"{path}#{name}" for name in in_front), str(path)]
    assert f"{path} breaks off or is damaged" in caplog.text

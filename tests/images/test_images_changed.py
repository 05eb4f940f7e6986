"""Shards and tables that are not what they were when they were listed."""

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.manifests import decode_all
from support.shards import listed, make_named_tar, make_tar, png, shades

from pipeline.versions import same_version


def test_a_shard_that_was_touched_is_the_same_and_one_that_grew_is_not(tmp_path):
    make_tar(tmp_path / "a.tar", [png(n) for n in range(3)])
    manifest = listed(str(tmp_path / "a.tar"))
    (tmp_path / "a.tar").touch()
    assert shades(decode_all(manifest)) == [0, 1, 2]
    make_tar(tmp_path / "a.tar", [png(n) for n in range(200)])
    table = decode_all(manifest)
    assert table["error"].to_pylist() == ["Changed"] * 3
    assert "--update" in table["message"][0].as_py()


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_shard_in_a_store_that_was_rewritten_gives_no_wrong_picture(tmp_path, request, kind):
    store = request.getfixturevalue({"s3": "s3_server", "gs": "gcs_server"}[kind])
    make_tar(tmp_path / "a.tar", [png(n) for n in range(3)])
    bucket = store.make_bucket()
    url = store.put(bucket, "a.tar", (tmp_path / "a.tar").read_bytes())
    manifest = listed(url, store.storage_options)
    assert shades(decode_all(manifest, storage_options=store.storage_options)) == [0, 1, 2]
    make_tar(tmp_path / "a.tar", [png(n) for n in (2, 1, 0)])  # as many bytes as before
    store.put(bucket, "a.tar", (tmp_path / "a.tar").read_bytes())
    table = decode_all(manifest, storage_options=store.storage_options)
    assert table["error"].to_pylist() == ["Changed"] * 3
    assert table["attempts"].to_pylist() == [1] * 3


def test_a_table_that_was_rewritten_gives_no_wrong_picture(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png(n) for n in range(3)]}), path)
    manifest = listed(str(path))
    path.touch()
    assert shades(decode_all(manifest)) == [0, 1, 2]
    pq.write_table(pa.table({"image": [png(n) for n in range(30, 70)]}), path)
    assert decode_all(manifest)["error"].to_pylist() == ["Changed"] * 3


def test_a_shard_whose_members_changed_places_gives_no_wrong_picture(tmp_path):
    """As large as before, pictures too, so that only the members' own headers tell."""
    path = tmp_path / "a.tar"
    pictures = {f"{n}.png": png(n, (16, 16)) for n in (1, 2, 3)}
    assert len({len(picture) for picture in pictures.values()}) == 1
    make_named_tar(path, pictures)
    manifest, size = listed(str(path)), path.stat().st_size
    make_named_tar(path, dict(reversed(pictures.items())))
    assert path.stat().st_size == size
    table = decode_all(manifest)
    assert shades(table) == [None, 2, None]
    assert table["error"].to_pylist() == ["Changed", None, "Changed"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_with_any_name_are_known_again(tmp_path, form):
    """Names that are long or not ASCII are not, or not whole, in the header before the picture."""
    names = ["a.png", "./b.png", "photos/" + 6 * "ten-letter" + "/" + 6 * "ten-letter" + ".png", "größe.png"]
    if form != tarfile.USTAR_FORMAT:
        names.append(30 * "ten-letter" + ".png")
    make_named_tar(tmp_path / "a.tar", {name: png(n) for n, name in enumerate(names)}, format=form)
    table = decode_all(listed(str(tmp_path / "a.tar")))
    assert shades(table) == list(range(len(names)))


def test_members_whose_name_stands_elsewhere_are_known_again(tmp_path):
    """tar-stream's word in its place where other attributes go with a member; a name that is not UTF-8."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as shard:
        for number, name in enumerate(("PaxHeader", "caf\udce9.png")):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(png(number)), {"path": "a.png"} if number == 0 else {}
            shard.addfile(info, io.BytesIO(png(number)))
    manifest = listed(str(tmp_path / "a.tar"))
    assert [uri.rpartition("#")[2] for uri in manifest["uri"].to_pylist()] == ["a.png", "caf\\udce9.png"]
    assert shades(decode_all(manifest)) == [0, 1]


@pytest.mark.parametrize("given", ['"0x8D"', 'W/"0x8D"', "0x8D"])
def test_an_etag_may_stand_in_quotes(given):
    """As Azure's and WebDAV's drivers give it, when a table is listed and when it is read."""
    assert same_version(f"{given}-1f", {"etag": given})
    assert same_version(f"{given}-1f", {"ETag": "0x8D"})
    assert not same_version(f"{given}-1f", {"etag": '"0x9"'})


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_table_in_a_store_whose_rows_changed_places_gives_no_wrong_picture(tmp_path, request, kind):
    store = request.getfixturevalue({"s3": "s3_server", "gs": "gcs_server"}[kind])
    bucket = store.make_bucket()

    def put(order):
        table = pa.table({"image": [png(n) for n in order]})
        pq.write_table(table, tmp_path / "a.parquet", compression="none", write_statistics=False, use_dictionary=False)
        return store.put(bucket, "a.parquet", (tmp_path / "a.parquet").read_bytes())

    manifest = listed(put((0, 1, 2)), store.storage_options)
    assert shades(decode_all(manifest, storage_options=store.storage_options)) == [0, 1, 2]
    size = (tmp_path / "a.parquet").stat().st_size
    put((2, 1, 0))
    assert (tmp_path / "a.parquet").stat().st_size == size
    assert decode_all(manifest, storage_options=store.storage_options)["error"].to_pylist() == ["Changed"] * 3

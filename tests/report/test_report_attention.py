"""`--attention-maps`: overlays and their page, behind a run of the command line."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import patchstream

from jobs.demo import draw
from pipeline.attention import spread
from pipeline.report.attention_page import AttentionPicture, render_attention_page
from pipeline.report.overlay import overlay_png

MODEL = Path(draw.__file__).parent / "model"
HOSTILE = '<img src=x onerror=alert(1)> & "quoted".png'


@pytest.mark.slow
def test_behind_a_run(tmp_path: Path) -> None:
    source, out, maps = tmp_path / "in", tmp_path / "out", tmp_path / "maps"
    draw.write_pictures(source, 12, seed=3)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    files[2].rename(files[2].with_name(HOSTILE))
    (source / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    arguments = ("classify", source, "--model", MODEL, "--out", out, "--attention-maps", maps, "--attention-images")
    first = patchstream(*arguments, "30")
    assert first.returncode == 0, first.stderr
    assert "attention maps" in first.stdout
    overlays = sorted(maps.glob("*.png"))
    assert len(overlays) == 12
    for path in overlays:
        with Image.open(path) as image:
            assert image.size == (384, 384)
    page = (maps / "index.html").read_text()
    assert page.count("<img ") == 12
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &#34;quoted&#34;.png" in page
    assert "the CLS token" in page
    assert "http" not in page.replace("http-equiv", "")

    # The run is done, so this only reads pictures again; one of them has gone, and there are fewer.
    (source / HOSTILE).unlink(missing_ok=True)
    for path in files[:2] + files[3:]:
        path.unlink()
    files_left = patchstream(*arguments[:-3], "--attention-maps", tmp_path / "few", "--attention-images", "3")
    assert files_left.returncode == 0, files_left.stderr
    assert not list((tmp_path / "few").glob("*.png"))
    assert (tmp_path / "few" / "index.html").read_text().count("cannot be shown") == 3


def test_wrong_use_is_said_before_the_run(tmp_path: Path) -> None:
    from jobs.cli import run_command

    draw.write_pictures(tmp_path / "in", 1, seed=1)
    arguments = ["embed", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--attention-maps", str(tmp_path / "m")]
    assert run_command([*arguments, "--backend", "null"]) == 2
    assert run_command([*arguments, "--model", str(MODEL), "--attention-images", "0"]) == 2
    assert not (tmp_path / "out").exists()


def test_bright_where_the_weight_is() -> None:
    weights = np.zeros((4, 4), np.float32)
    weights[1, 2] = 1.0
    picture = np.full((64, 96, 3), 128, np.uint8)
    with Image.open(io.BytesIO(overlay_png(picture, weights))) as image:
        assert image.size == (576, 384)
        light = np.asarray(image.convert("L"), float)
    cell = light[96:192, 288:432]
    assert cell.mean() > light.mean() + 30
    assert light[96:192, 288:432][48, 72] == pytest.approx(light.max(), abs=3)


def test_a_flat_map_is_no_division_by_zero() -> None:
    data = overlay_png(np.zeros((400, 400, 3), np.uint8), np.full((2, 2), 0.25, np.float32))
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (400, 400)


def test_the_page_escapes_and_asks_nobody() -> None:
    pictures = [
        AttentionPicture(0, "s3://b/<b>.jpg", "<i>label</i>", 0.5, "row-0.png"),
        AttentionPicture(1, "s3://b/gone.jpg", reason="404 <script>"),
    ]
    page = render_attention_page([("model", "<model>")], pictures, "the CLS token")
    for text in ("<b>", "<i>", "<script", "<model>"):
        assert text not in page
    assert "default-src &#39;none&#39;" in page
    assert "cannot be shown: 404 &lt;script&gt;" in page


def test_images_are_spread_over_the_rows() -> None:
    spans = np.array([[0, 10], [100, 110]])
    assert spread(spans, 100).tolist() == [*range(10), *range(100, 110)]
    assert spread(spans, 3).tolist() == [0, 100, 109]
    assert spread(spans, 1).tolist() == [0]
    assert spread(np.empty((0, 2), np.int64), 5).tolist() == []

"""Which processes keep their heap small: those that decode, and none that computes features."""

import base64
import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.checkpoints import make_checkpoint
from support.runs import RunContent, manifest_name, write_run

from jobs.demo.draw import write_pictures
from pipeline.decoding import DecodeJob, decode_rows
from pipeline.distance import _first_pictures
from pipeline.images.stage import Reading
from pipeline.models import inspect_model
from pipeline.online import Settings, answer
from pipeline.opening import resolve_job
from pipeline.predicting import place_job
from pipeline.preflight import measure
from pipeline.sources.manifest import ManifestPart
from schemas.machines import Machines
from schemas.preprocessing import Preprocessing
from schemas.release import release
from schemas.spec import build_spec

pytestmark = pytest.mark.timeout(120)

_BLOCK_BYTES = 8 << 20
_IS_MMAPPED = 2


def second_block_is_mapped() -> bool:
    """Whether glibc maps a second block of the size of an activation again, by the flag in front of it: pages that are
    new to the process. Left alone it keeps the first one and gives it again."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(libc.malloc(_BLOCK_BYTES))
    block = libc.malloc(_BLOCK_BYTES)
    found = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & _IS_MMAPPED
    libc.free(block)
    return bool(found)


def mapped_after(work: Callable[..., Any], *arguments: Any) -> bool:
    """In a process that did `work` and nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(work, *arguments).result()
        return process.submit(second_block_is_mapped).result()


def _preflight(photos: str, model: str) -> None:
    resolved = resolve_job(build_spec({"sources": [photos], "model": model, "out": "memory://o", "batch_size": 2}))
    measure(resolved, place_job(resolved, Machines(1, 0, 1e9, 1, (1.0,)), 1000), seconds=0)


def _predict(photo: str, model: str) -> None:
    answer(inspect_model(model), [base64.b64encode(Path(photo).read_bytes()).decode()], Settings())


RANGES = pa.table({"start": [0], "stop": [2]})


def _job(run: str, name: str) -> DecodeJob:
    return DecodeJob(
        run, [ManifestPart(name, 0, 2)], Reading(Preprocessing(resize=(8, 8))), 2, "run", release(), null=False
    )


def _decode(run: str, name: str) -> None:
    list(decode_rows(RANGES, _job(run, name)))


def _look_for_pictures(run: str, name: str) -> None:
    _first_pictures([RANGES], _job(run, name))


@pytest.mark.parametrize("work", [_preflight, _predict])
def test_a_forward_pass_gets_the_same_memory_again(tmp_path: Path, work: Callable[[str, str], None]) -> None:
    """Of the decoders' settings a batch of ViT-B would pay for a hundred thousand new pages."""
    model = make_checkpoint(tmp_path / "vit", "vit-classifier", image_size=32, hidden_size=64, num_attention_heads=2)
    write_pictures(tmp_path / "photos", 2, seed=0)
    photo = next(path for path in sorted((tmp_path / "photos").rglob("*")) if path.is_file())
    assert not mapped_after(work, str(photo), str(model))


def test_a_decoder_gives_pictures_back_to_the_system(tmp_path: Path) -> None:
    content = RunContent({"cls": np.zeros((2, 4), np.float32)}, uris=[str(tmp_path / name) for name in "ab"])
    assert mapped_after(_decode, str(write_run(tmp_path / "run", content)), manifest_name(content))


def test_who_measures_a_precision_decodes_and_computes_features_in_one_process(tmp_path: Path) -> None:
    content = RunContent({"cls": np.zeros((2, 4), np.float32)}, uris=[str(tmp_path / name) for name in "ab"])
    assert not mapped_after(_look_for_pictures, str(write_run(tmp_path / "run", content)), manifest_name(content))

"""Batches through two buffers: every image once, in order, whatever the counts; and what happens without memory."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint

from pipeline.models import inspect_model, with_head
from pipeline.predictors import torch_predictor
from pipeline.predictors.batches import Predictions, Wanted
from pipeline.predictors.torch_predictor import TorchPredictor
from pipeline.predictors.torch_runner import Runner
from schemas.errors import ClusterError

SHAPE = (4, 6, 3)


def numbered(count: int) -> np.ndarray:
    pixels = np.zeros((count, *SHAPE), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    return pixels


def identify(batch: torch.Tensor) -> Sequence[torch.Tensor]:
    first = batch[:, 0, 0].int()
    return first[:, 0] + 256 * first[:, 1], batch.float().mean(dim=(1, 2))


def runner(batch: int) -> Runner:
    return Runner(identify, batch=batch, shape=SHAPE, device=torch.device("cpu"), graphs=True)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 23, 300])
def test_every_image_once_in_order(count: int) -> None:
    number, mean = runner(8).run(numbered(count))
    assert number.tolist() == list(range(count))
    assert mean.shape == (count, 3)


def test_a_runner_is_used_again_and_again() -> None:
    used = runner(8)
    for count in (20, 3, 8, 1):
        assert used.run(numbered(count))[0].tolist() == list(range(count))


def test_batches_have_one_size_and_are_padded_with_black() -> None:
    seen: list[torch.Tensor] = []

    def remember(batch: torch.Tensor) -> Sequence[torch.Tensor]:
        seen.append(batch.clone())
        return (batch[:, 0, 0, 0],)

    used = Runner(remember, batch=8, shape=SHAPE, device=torch.device("cpu"), graphs=False)
    seen.clear()
    used.run(np.full((11, *SHAPE), 9, np.uint8))
    assert [tuple(batch.shape) for batch in seen] == [(8, *SHAPE)] * 2
    assert seen[1][:3].eq(9).all()
    assert seen[1][3:].eq(0).all()


def test_an_attention_kernel_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[set[str]] = []
    reset: list[bool] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: reset.append(True))

    def without_cudnn(batch: torch.Tensor) -> Sequence[torch.Tensor]:
        allowed = {
            name for name, on in (("cudnn", torch.backends.cuda.cudnn_sdp_enabled()),
                                  ("flash", torch.backends.cuda.flash_sdp_enabled())) if on
        }  # fmt: skip
        tried.append(allowed)
        if "cudnn" in allowed:
            raise RuntimeError("no execution plans support the graph")
        return identify(batch)

    def made(*attention: str) -> Runner:
        device = torch.device("cpu")
        return Runner(without_cudnn, batch=8, shape=SHAPE, device=device, graphs=False, attention=attention)

    used = made("CUDNN_ATTENTION", "FLASH_ATTENTION", "MATH")
    assert used.attention == ("FLASH_ATTENTION", "MATH")
    assert used.run(numbered(20))[0].tolist() == list(range(20))
    assert tried[0] == {"cudnn", "flash"}
    assert reset == [True], "what was compiled would have the kernel in it"
    assert all(allowed == {"flash"} for allowed in tried[1:])
    with pytest.raises(RuntimeError, match="no execution plans"):
        made("CUDNN_ATTENTION")


def test_what_fails_with_every_kernel_is_not_told_as_theirs(caplog: pytest.LogCaptureFixture) -> None:
    said = iter(["CUBLAS_STATUS_NOT_SUPPORTED", "the same again", "and again"])

    def fails(batch: torch.Tensor) -> Sequence[torch.Tensor]:
        raise RuntimeError(next(said))

    kernels = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_NOT_SUPPORTED"):
        Runner(fails, batch=8, shape=SHAPE, device=torch.device("cpu"), graphs=False, attention=kernels)
    assert not caplog.records


def masked() -> RuntimeError:
    """As the end of a capture hides what went wrong in it."""
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError(), torch.OutOfMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), torch.OutOfMemoryError),
        (masked(), torch.OutOfMemoryError),
        (NotImplementedError(), NotImplementedError),
    ],
)
def test_what_is_not_for_want_of_a_kernel_is_not_tried_again(error: RuntimeError, kind: type[RuntimeError]) -> None:
    tried: list[bool] = []

    def fails(batch: torch.Tensor) -> Sequence[torch.Tensor]:
        tried.append(True)
        raise error

    with pytest.raises(kind):
        Runner(
            fails, batch=8, shape=SHAPE, device=torch.device("cpu"), graphs=False,
            attention=("FLASH_ATTENTION", "MATH"),
        )  # fmt: skip
    assert tried == [True]


def test_a_call_may_be_handed_over_before_the_one_before_is_fetched() -> None:
    used = runner(8)
    first, second = used.start(numbered(11)), used.start(numbered(300))
    third = used.start(numbered(8))
    for underway, count in ((second, 300), (first, 11), (third, 8)):
        assert underway.results()[0].tolist() == list(range(count))


def test_seconds_of_two_calls_at_once_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = inspect_model(str(make_checkpoint(tmp_path / "vit", "vit-classifier")))
    predictor = TorchPredictor(info, wanting(info), dtype="float32", batch_size=16)
    now = iter([12.0, 13.0, 20.5] * 2)
    monkeypatch.setattr("pipeline.predictors.torch_predictor.time.perf_counter", lambda: next(now))
    begun = (10.0, 10.5, 20.0)
    assert [predictor._seconds_since(started) for started in begun] == [2.0, 2.5, 0.5], "each has cores of its own"
    predictor._runner = runner(8)
    assert [predictor._seconds_since(started) for started in begun] == [2.0, 1.0, 0.5], "they take turns"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_calls_in_several_threads_give_what_they_give_alone(tmp_path: Path, dtype: str) -> None:
    info = inspect_model(str(make_checkpoint(tmp_path / "vit", "vit-classifier")))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 224, 224, 3), dtype=np.uint8)
    parts = [pixels[start:stop] for start, stop in ((0, 8), (8, 11), (11, 19), (19, 24)) * 4]
    alone = TorchPredictor(info, wanting(info), dtype=dtype, batch_size=8, threads=1)
    expected = [alone.predict(part) for part in parts[:4]] * 4
    together = TorchPredictor(info, wanting(info), dtype=dtype, batch_size=8, threads=1)

    def predict(part: np.ndarray) -> tuple[Predictions, int]:
        return together.predict(part), torch.get_num_threads()

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(predict, parts))
    torch.set_num_threads(threads)
    for (mine, used), theirs in zip(found, expected, strict=True):
        assert used == 1
        for name in ("cls", "pooled"):
            np.testing.assert_allclose(mine.features[name], theirs.features[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(mine.indices, theirs.indices)


def test_labels_are_ranked_where_the_scores_of_all_but_the_first_are_zero(tmp_path: Path) -> None:
    plain = inspect_model(str(make_checkpoint(tmp_path / "vit", "vit-classifier")))
    bias = np.array([-900, 0, -300, -600], np.float32)
    info = with_head(plain, tuple("abcd"), np.zeros((4, plain.hidden_size), np.float32), bias, "cls", "")
    predictor = TorchPredictor(info, wanting(info), dtype="float32", batch_size=2)
    found = predictor.predict(np.zeros((2, 224, 224, 3), np.uint8))
    np.testing.assert_array_equal(found.indices, [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(found.scores, [[1, 0, 0]] * 2)


def wanting(info: object) -> Wanted:
    return Wanted(("cls", "pooled"), (info.hidden_size, info.pooled_size), "float32", 3, info.labels, False)  # type: ignore[attr-defined]


def test_without_memory_the_batch_is_halved_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a GPU on this device: its runner, and a device that has no room for more than three images."""
    info = inspect_model(str(make_checkpoint(tmp_path / "vit", "vit-classifier")))
    predictor = TorchPredictor(info, wanting(info), dtype="float32", batch_size=16)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 224, 224, 3), dtype=np.uint8)
    expected = predictor.predict(pixels)
    forward = predictor._forward

    def small(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(batch) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(batch)

    timed: list[tuple[int, bool]] = []

    def remember(runner: Runner, pixels: np.ndarray) -> float:
        timed.append((len(pixels), bool(pixels.any())))
        return 1.0

    monkeypatch.setattr("pipeline.predictors.torch_predictor._images_per_s", remember)
    monkeypatch.setattr(predictor, "_forward", small)
    runner = predictor._fastest()
    assert runner.batch == predictor.batch_size == 1, "the smaller of two that are as fast"
    assert timed == [(4, True), (4, True)], "as many images as the larger has in two batches, and not all black"
    predictor._batch, predictor._call_rows = 2, 3
    predictor._fastest()
    assert timed[2:] == [(3, True), (3, True)], "as many images as a call brings"
    predictor._runner = runner
    got = predictor.predict(pixels)
    assert np.abs(got.features["cls"] - expected.features["cls"]).max() < 1e-4
    assert got.indices is not None
    assert expected.indices is not None
    assert (got.indices == expected.indices).all()

    def no_second(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(batch) < 16:
            raise torch.OutOfMemoryError("the first runner has taken it all")
        return forward(batch)

    predictor._batch = 16
    monkeypatch.setattr(predictor, "_forward", no_second)
    assert predictor._fastest().batch == 16

    def none(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(predictor, "_forward", none)
    monkeypatch.setattr(runner, "start", none)
    predictor._batch, predictor._runner = 1, runner
    for _ in range(2):  # the call behind it is told the same, and does not compute as if there were no device
        with pytest.raises(ClusterError, match="batch of one image"):
            predictor.predict(pixels)


def test_a_gpu_without_float8_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_predictor._check_float8("this CPU", "cpu")

    def refuse(*arguments: object) -> torch.Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmulAlgoGetHeuristic")

    monkeypatch.setattr(torch_predictor, "scaled_product", refuse)
    advice = "use --dtype bfloat16 in another --out"
    with pytest.raises(ClusterError, match=rf"float8 .* on NVIDIA X .*NOT_SUPPORTED.*{advice}"):
        torch_predictor._check_float8("NVIDIA X", "cpu")


def test_float8_is_refused_where_its_passes_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch_predictor, "_check_float8", lambda name: None)
    monkeypatch.setattr(torch_predictor, "has_compiler", lambda: True)
    torch_predictor._check_gpu("float8")
    monkeypatch.setattr(torch_predictor, "has_compiler", lambda: False)
    torch_predictor._check_gpu("bfloat16")
    with pytest.raises(ClusterError, match=r"no C compiler .*install gcc.*or use --dtype bfloat16 in another --out"):
        torch_predictor._check_gpu("float8")


@pytest.mark.parametrize(
    ("capability", "dtype", "instead"), [((7, 5), "bfloat16", "float16"), ((8, 0), "float8", "bfloat16")]
)
def test_a_gpu_without_the_units_names_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str, instead: str
) -> None:
    """A directory holds one precision: the other one needs another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(ClusterError, match=f"has no {dtype} units; use --dtype {instead} in another --out"):
        torch_predictor._check_gpu(dtype)

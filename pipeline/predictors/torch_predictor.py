"""The torch predictor: one model on one device, fixed batch shape, copies hidden behind compute."""

import gc
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.models import ModelInfo, load_model
from pipeline.models.gpu import GpuPlan, choose_batch, has_compiler, plan_gpu
from pipeline.models.precision import BFLOAT16_SINCE_SM, FLOAT8_SINCE_SM, describe_hardware, torch_dtype
from pipeline.models.quantised import quantise_float8, scaled_product
from pipeline.predictors.batches import Predictions, Wanted, good_rows, pixels_of, predicted_table
from pipeline.predictors.torch_runner import Runner, Underway, compile_trunk
from schemas.errors import ClusterError
from schemas.spec import VECTOR_NAMES

# Since which compute capability there are units for it, and what to use before.
_UNITS = {"bfloat16": (BFLOAT16_SINCE_SM, "float16"), "float8": (FLOAT8_SINCE_SM, "bfloat16")}

_log = logging.getLogger(__name__)


class TorchPredictor:
    """Runs `info`'s model over decoded tables. Several threads may call it: on a GPU one's batches follow the other's,
    on a CPU each computes its own, with `threads` threads.

    On a GPU it is warm (kernels chosen, memory taken) when the constructor returns. On a CPU there is next to nothing
    to warm, and a batch of zeros would take as long as the first batch of pictures. `call_rows`: the most images that a
    call brings, 0 where that is not known.
    """

    def __init__(
        self,
        info: ModelInfo,
        wanted: Wanted,
        *,
        dtype: str,
        batch_size: int,
        threads: int = 0,
        cuda: bool = False,
        work_gflop: float = 0.0,
        call_rows: int = 0,
        storage_options: Mapping[str, Any] = {},
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        if cuda:
            _check_gpu(dtype)
            # A predictor that was let go before holds itself in a circle, and with it weights and graphs on the GPU.
            gc.collect()
            torch.cuda.empty_cache()
            # The little that is float32 beside a trunk of fewer bits: TF32 has more of them than the trunk.
            torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")
        self._device = torch.device("cuda" if cuda else "cpu")
        outputs = (*wanted.features, *(("logits",) if wanted.labels else ()))
        self._model = load_model(
            info, dtype=torch_dtype(dtype), device=self._device, storage_options=storage_options, outputs=outputs
        )
        self._wanted = wanted
        # Asking for no more than is needed lets the last block compute the prefix tokens alone.
        self._on_request = [name for name in wanted.features if name not in VECTOR_NAMES]
        self._dtype, self._batch, self._call_rows = dtype, batch_size, call_rows
        self._turn = threading.Lock()
        self._ended = 0.0
        self._shape = (*info.preprocessing.output_size, 3)
        self._plan: GpuPlan | None = None
        self._runner: Runner | None = None
        self._lost: Exception | None = None
        if cuda:
            self._plan = plan_gpu(
                describe_hardware(cuda=True),
                dtype,
                attention_bias=info.network.relative_positions != "none",
                work_gflop=work_gflop,
                compiler=has_compiler(),
            )
            if self._plan.compiled != "nothing":
                compile_trunk(self._model.trunk, self._plan.compiled)
            self._runner = self._fastest()
            # What was tried and not taken, for the other actors of this GPU.
            torch.cuda.empty_cache()

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Predicted table for a decoded one."""
        started = time.perf_counter()
        good = good_rows(decoded)
        pixels = pixels_of(decoded, *self._shape[:2])
        predictions = self.predict(pixels)
        return predicted_table(decoded, good, predictions, self._wanted, self._seconds_since(started))

    @property
    def batch_size(self) -> int:
        """Images in a batch: on a GPU as measured, and less once memory ran short."""
        return self._batch

    @torch.inference_mode()
    def predict(self, pixels: npt.NDArray[np.uint8]) -> Predictions:
        """Features and labels for `pixels`, (n, H, W, 3) uint8.

        When the device runs out of memory the batch size is halved and the pixels are run again.
        """
        if not len(pixels):
            return self._collect([])
        with self._turn:
            underway = self._handed_over(pixels)
        if underway is not None:
            return self._collect([tuple(underway.results())])
        batches = (pixels[start : start + self._batch] for start in range(0, len(pixels), self._batch))
        return self._collect([self._forward(_tensor(batch)) for batch in batches])

    def _handed_over(self, pixels: npt.NDArray[np.uint8]) -> Underway | None:
        """To the runner, a smaller one if need be; None where there is none."""
        if self._lost is not None:
            raise self._lost
        while self._runner is not None:
            # Handled behind the block: until then the traceback holds what lay on the device.
            with suppress(torch.OutOfMemoryError):
                return self._runner.start(pixels)
            try:
                self._runner = self._smaller()
            except Exception as error:
                self._lost = error  # for the call that waits for its turn, and would compute without a runner
                raise
        return None

    def _seconds_since(self, started: float) -> float:
        """Less those in which the call before had the device."""
        ended = time.perf_counter()
        if self._runner is None:
            return ended - started
        seconds = ended - max(started, self._ended)
        self._ended = ended
        return max(0.0, seconds)

    @torch.inference_mode()
    def _fastest(self) -> Runner:
        """The runner whose batch size was measured to be best, of the one asked for and its half.

        Both get as many images as a call brings, and no more than two batches of the larger: what a call of more than
        four takes is timed too short, which would flatter the half. What is compiled would be compiled anew for each
        size, which takes longer than a better one saves.
        """
        largest, rates = self._fitting(), dict[int, float]()
        while not rates:
            if largest.batch == 1 or (self._plan is not None and self._plan.compiled != "nothing"):
                return largest
            most = 2 * largest.batch
            pixels = _noise((min(self._call_rows or most, most), *self._shape))
            with suppress(torch.OutOfMemoryError):
                rates[largest.batch] = _images_per_s(largest, pixels)
            if not rates:
                del largest  # its memory is for the next
                largest = self._smaller()
        try:
            half = self._made(largest.batch // 2)
            rates[half.batch] = _images_per_s(half, pixels)
        except torch.OutOfMemoryError:
            # Two runners at once may be more than the device holds. The one that fits is good.
            return largest
        chosen = choose_batch(rates)
        _log.info("images/s by batch size: %s; taking %d", rates, chosen)
        self._batch = chosen
        return largest if chosen == largest.batch else half

    def _fitting(self) -> Runner:
        while True:
            with suppress(torch.OutOfMemoryError):
                return self._made(self._batch)
            self._halve()

    def _smaller(self) -> Runner:
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # the call before may still compute in what is given back here
        self._runner = None
        self._halve()
        return self._fitting()

    def _halve(self) -> None:
        if self._batch == 1:
            raise ClusterError("the GPU lacks the memory for a batch of one image; use a larger GPU or a smaller model")
        self._batch //= 2
        if self._plan is not None and self._plan.compiled != "nothing":
            torch.compiler.reset()  # dynamo compiles a function for eight shapes and no more
        gc.collect()
        torch.cuda.empty_cache()
        _log.warning("out of device memory: batch size is %d from here on", self._batch)

    def _made(self, batch: int) -> Runner:
        plan = self._plan or GpuPlan((), "nothing", graphs=False)
        if plan.compiled != "nothing":
            # Where Triton cannot build after all (a read-only home), other precisions lose a few percent, float8 all
            # that it is chosen for. Each time, for it holds in the thread that sets it.
            torch._dynamo.config.suppress_errors = self._dtype != "float8"
        return Runner(
            self._forward,
            batch=batch,
            shape=self._shape,
            device=self._device,
            graphs=plan.graphs,
            attention=plan.attention,
        )

    def _forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The features that are wanted, then scores and indices where labels are wanted; a row for each image."""
        outputs = self._model(batch, self._on_request)
        tensors = [getattr(outputs, name) for name in self._wanted.features]
        if self._wanted.labels:
            logits = outputs.logits.float()
            scores = torch.sigmoid(logits) if self._wanted.multi_label else torch.softmax(logits, dim=-1)
            # By logits: all scores behind one that is almost certain may be 0 in float32.
            best = torch.topk(logits, self._wanted.labels, dim=-1).indices
            tensors += [scores.gather(-1, best), best]
        return tuple(tensors)

    def _collect(self, done: list[tuple[torch.Tensor, ...]]) -> Predictions:
        names = self._wanted.features
        if not done:
            none = np.empty((0, self._wanted.labels))
            sizes = [size if isinstance(size, tuple) else (size,) for size in self._wanted.dims]
            features = {name: np.empty((0, *size), np.float32) for name, size in zip(names, sizes, strict=True)}
            return Predictions(features, none, none.astype(np.int64)) if self._wanted.labels else Predictions(features)
        columns = [(parts[0] if len(parts) == 1 else torch.cat(parts)).numpy() for parts in zip(*done, strict=True)]
        features = dict(zip(names, columns[: len(names)], strict=True))
        if not self._wanted.labels:
            return Predictions(features)
        return Predictions(features, columns[-2], columns[-1])


def _tensor(batch: npt.NDArray[np.uint8]) -> torch.Tensor:
    # The array may view a read-only Arrow buffer; torch wants to be told that nobody writes to it.
    return torch.from_numpy(batch if batch.flags.writeable else batch.copy())


def _noise(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Zeros would flatter: a GPU that multiplies them draws less power and so keeps a higher clock."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _images_per_s(runner: Runner, pixels: npt.NDArray[np.uint8]) -> float:
    """Of calls that follow one another as in a job, copies included: the next is handed over while one computes.

    Of up to four batches: a call of more waits in `start`, while the device computes on before the clock begins.
    """
    before, underway = runner.start(pixels), runner.start(pixels)
    before.results()
    started = time.perf_counter()
    following = runner.start(pixels)
    underway.results()
    following.results()
    return 2 * len(pixels) / (time.perf_counter() - started)


def _check_gpu(dtype: str) -> None:
    if not torch.cuda.is_available():
        raise ClusterError(
            "Ray gave this actor a GPU but torch sees none: the worker's torch is a CPU build or its driver is too old"
        )
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    since, instead = _UNITS.get(dtype, ((0, 0), ""))
    if capability < since:
        raise ClusterError(
            f"{name} (compute capability {capability[0]}.{capability[1]}) has no {dtype} units; use --dtype {instead} "
            "in another --out"
        )
    if dtype == "float8":
        _check_compiler()
        _check_float8(name)


def _check_compiler() -> None:
    if not has_compiler():
        raise ClusterError(
            "--dtype float8 compiles its passes, without which it is slower than bfloat16, and this machine has no C "
            "compiler or no Python.h: install gcc, libc6-dev and Python's headers there, or use --dtype bfloat16 in "
            "another --out"
        )


def _check_float8(name: str, device: str = "cuda") -> None:
    """That there is such a product at all: for some GPUs with the units a version of torch or CUDA has none."""
    rows, scale = quantise_float8(torch.ones(16, 16, device=device))
    try:
        scaled_product(rows, scale, rows.t(), scale.reshape(1, -1), None)
    except RuntimeError as error:
        raise ClusterError(
            f"torch {torch.__version__} does not multiply in float8 with a scale for each row on {name} ({error}); "
            "use --dtype bfloat16 in another --out"
        ) from None

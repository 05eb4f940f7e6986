"""The torch predictor: one model on one device, fixed batch shape, copies hidden behind compute."""

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.models import ModelInfo, load_model
from pipeline.models.precision import torch_dtype
from pipeline.predictors.batches import Predictions, Wanted, good_rows, pixels_of, predicted_table
from schemas.errors import ClusterError
from schemas.spec import VECTOR_NAMES

_BFLOAT16_SINCE = (8, 0)

_log = logging.getLogger(__name__)


class TorchPredictor:
    """Runs `info`'s model over decoded tables. Warm (kernels chosen, memory taken) when the constructor returns."""

    def __init__(
        self,
        info: ModelInfo,
        wanted: Wanted,
        *,
        dtype: str,
        batch_size: int,
        threads: int = 0,
        cuda: bool = False,
        storage_options: Mapping[str, Any] = {},
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        if cuda:
            _check_gpu(dtype)
        self._device = torch.device("cuda" if cuda else "cpu")
        precision = torch_dtype(dtype)
        outputs = (*wanted.features, *(("logits",) if wanted.labels else ()))
        self._model = load_model(
            info, dtype=precision, device=self._device, storage_options=storage_options, outputs=outputs
        )
        self._wanted = wanted
        # Asking for no more than is needed lets the last block compute the prefix tokens alone.
        self._on_request = [name for name in wanted.features if name not in VECTOR_NAMES]
        self._batch = batch_size
        self._height, self._width = info.preprocessing.output_size
        self._copies = torch.cuda.Stream() if cuda else None  # type: ignore[no-untyped-call]
        self._warm_up()

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Predicted table for a decoded one."""
        started = time.perf_counter()
        good = good_rows(decoded)
        pixels = pixels_of(decoded, self._height, self._width)
        predictions = self.predict(pixels)
        return predicted_table(decoded, good, predictions, self._wanted, time.perf_counter() - started)

    @torch.inference_mode()
    def predict(self, pixels: npt.NDArray[np.uint8]) -> Predictions:
        """Features and labels for `pixels`, (n, H, W, 3) uint8.

        When the device runs out of memory the batch size is halved and the batch is run again.
        """
        done: list[tuple[torch.Tensor, ...]] = []
        position = 0
        while position < len(pixels):
            try:
                for outputs in self._run(pixels[position:]):
                    done.append(outputs)
                    position += len(outputs[0])
            except torch.OutOfMemoryError:
                if self._batch == 1:
                    raise
                self._batch = max(1, self._batch // 2)
                torch.cuda.empty_cache()
                _log.warning("out of device memory: batch size is %d from here on", self._batch)
        return self._collect(done)

    def _run(self, pixels: npt.NDArray[np.uint8]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Outputs batch by batch. On CUDA the next batch is copied over while this one computes."""
        starts = range(0, len(pixels), self._batch)
        staged = self._stage(pixels, 0)
        for start in starts:
            batch, count = staged
            if self._copies is not None:
                torch.cuda.current_stream().wait_stream(self._copies)
                batch.record_stream(torch.cuda.current_stream())
            outputs = self._forward(batch, count)
            if start + self._batch < len(pixels):
                staged = self._stage(pixels, start + self._batch)
            yield outputs

    def _stage(self, pixels: npt.NDArray[np.uint8], start: int) -> tuple[torch.Tensor, int]:
        """The batch at `start` on the device, and how many of its rows are real: the last one is padded on CUDA."""
        part = pixels[start : start + self._batch]
        if self._copies is None:
            # The array may view a read-only Arrow buffer; torch wants to be told that nobody writes to it.
            return torch.from_numpy(part if part.flags.writeable else part.copy()), len(part)
        pinned = torch.empty((self._batch, *part.shape[1:]), dtype=torch.uint8, pin_memory=True)
        pinned[: len(part)] = torch.from_numpy(part if part.flags.writeable else part.copy())
        pinned[len(part) :] = 0
        with torch.cuda.stream(self._copies):
            return pinned.to(self._device, non_blocking=True), len(part)

    def _forward(self, batch: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """The features that are wanted, then scores and indices where labels are wanted; `count` rows each."""
        outputs = self._model(batch, self._on_request)
        tensors = [getattr(outputs, name)[:count] for name in self._wanted.features]
        if self._wanted.labels:
            logits = outputs.logits[:count].float()
            scores = torch.sigmoid(logits) if self._wanted.multi_label else torch.softmax(logits, dim=-1)
            best = torch.topk(scores, self._wanted.labels, dim=-1)
            tensors += [best.values, best.indices]
        if self._copies is None:
            return tuple(tensors)
        return tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)

    def _collect(self, done: list[tuple[torch.Tensor, ...]]) -> Predictions:
        if self._copies is not None:
            torch.cuda.synchronize()
        names = self._wanted.features
        if not done:
            none = np.empty((0, self._wanted.labels))
            sizes = [size if isinstance(size, tuple) else (size,) for size in self._wanted.dims]
            features = {name: np.empty((0, *size), np.float32) for name, size in zip(names, sizes, strict=True)}
            return Predictions(features, none, none.astype(np.int64)) if self._wanted.labels else Predictions(features)
        columns = [torch.cat(parts).numpy() for parts in zip(*done, strict=True)]
        features = dict(zip(names, columns[: len(names)], strict=True))
        if not self._wanted.labels:
            return Predictions(features)
        return Predictions(features, columns[-2], columns[-1])

    def _warm_up(self) -> None:
        blank = np.zeros((self._batch, self._height, self._width, 3), np.uint8)
        with torch.inference_mode():
            self.predict(blank)


def _check_gpu(dtype: str) -> None:
    if not torch.cuda.is_available():
        raise ClusterError(
            "Ray gave this actor a GPU but torch sees none: the worker's torch is a CPU build or its driver is too old"
        )
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if dtype == "bfloat16" and capability < _BFLOAT16_SINCE:
        raise ClusterError(
            f"{name} (compute capability {capability[0]}.{capability[1]}) has no bfloat16 units; use --dtype float16"
        )

"""One connection to a Triton server over gRPC: a request at a time, through shared memory on the same host.

The regions are unlinked as soon as the server has mapped them, so that a killed actor leaves nothing in /dev/shm. What
the server has mapped it gives back when the connection is closed; that of an actor that was killed, when it ends.
"""

import contextlib
import logging
import mmap
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from pipeline.predictors.triton_protocol import INPUT_NAME, ServedModel, parse_url
from schemas.errors import SpecError
from schemas.spec import TritonSpec

_log = logging.getLogger(__name__)

SHARED_MEMORY_FOLDER = "/dev/shm"
_FLOAT32_BYTES = 4
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
# A server that returns is to be found within seconds; gRPC's own reconnect pauses grow to two minutes, and are shared
# by all channels of a process unless each keeps its own pool.
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.use_local_subchannel_pool", 1),
]
# The server, or the way to it, is not there; the same request may succeed later.
_AWAY = {"StatusCode.UNAVAILABLE", "StatusCode.RESOURCE_EXHAUSTED", "StatusCode.CANCELLED"}
_LATE = {"StatusCode.DEADLINE_EXCEEDED"}
_REFUSED = {"StatusCode.UNAUTHENTICATED", "StatusCode.PERMISSION_DENIED", "StatusCode.UNIMPLEMENTED"}

Check = Callable[[Mapping[str, Any]], ServedModel]


class ServerAway(Exception):
    """Nobody answers, or the model is not loaded (yet)."""


class DeadlineMissed(ServerAway):
    """No answer within the deadline."""


class ServerError(Exception):
    """The server answered that this request failed."""


class Connection:
    """A channel to the server, with `check` passed by its model, and memory shared with it where that works."""

    def __init__(self, spec: TritonSpec, model_name: str, check: Check, connect_s: float) -> None:
        """Raises ServerAway if there is no answer in `connect_s`, SpecError if the model fails `check`."""
        address = parse_url(spec.url)
        # gRPC takes header names in lower case only.
        self._headers = {name.lower(): value for name, value in spec.headers.items()}
        self._client = triton.InferenceServerClient(address.target, ssl=address.tls, channel_args=_CHANNEL)
        self._region: _Region | None = None
        try:
            self._config = self._ask(self._client.get_model_config, model_name, as_json=True, client_timeout=connect_s)
            self.model = check(self._config["config"])
            ready = self._ask(self._client.is_model_ready, model_name, client_timeout=connect_s)
            if not ready:
                raise ServerAway(f"model {model_name} is not ready")
            if is_this_host(address.host):
                self._region = self._share(connect_s)
        except BaseException:
            self.close()
            raise

    def infer(self, pixels: npt.NDArray[np.uint8], deadline_s: float) -> dict[str, npt.NDArray[np.float32]]:
        """Outputs by name, (n, size) float32, for `pixels` (n, H, W, 3), in requests that the model takes at once.

        Raises ServerAway or DeadlineMissed where the same request may succeed later, ServerError where the server
        failed on it. `deadline_s` is for one request.
        """
        step, name = self.model.max_batch_size, self.model.name
        parts = [self._infer(pixels[start : start + step], deadline_s) for start in range(0, len(pixels), step)]
        # gRPC reconnects by itself, also to a server that holds another model by now. Asking takes 1 ms.
        config = self._ask(self._client.get_model_config, name, as_json=True, client_timeout=deadline_s)
        if config != self._config:
            raise ServerAway(f"model {name} has been replaced")
        return {name: np.concatenate([part[name] for part in parts]) for name, _ in self.model.outputs}

    def _infer(self, pixels: npt.NDArray[np.uint8], deadline_s: float) -> dict[str, npt.NDArray[np.float32]]:
        request = triton.InferInput(INPUT_NAME, list(pixels.shape), "UINT8")
        outputs = [triton.InferRequestedOutput(name) for name, _ in self.model.outputs]
        if self._region is None:
            request.set_data_from_numpy(pixels)
        else:
            self._region.place(request, outputs, pixels, self.model)
        result = self._ask(self._client.infer, self.model.name, [request], outputs=outputs, client_timeout=deadline_s)
        if self._region is not None:
            return self._region.read(len(pixels), self.model)
        return {name: _as_rows(result, name, (len(pixels), size)) for name, size in self.model.outputs}

    @property
    def shares_memory(self) -> bool:
        """Whether pixels and outputs bypass the channel."""
        return self._region is not None

    def close(self) -> None:
        """Give back what the server holds for this connection, if it still answers."""
        if self._region is not None:
            with contextlib.suppress(InferenceServerException, ValueError):
                self._client.unregister_system_shared_memory(
                    self._region.name, headers=self._headers, client_timeout=1.0
                )
            self._region = None
        self._client.close()

    def _ask(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, headers=self._headers, **options)
        except InferenceServerException as error:
            raise _translate(error) from error

    def _share(self, connect_s: float) -> "_Region | None":
        """A region that the server has mapped, or None where it cannot: another container, a full /dev/shm."""
        try:
            region = _Region(self.model)
        except OSError as error:
            _log.info("no shared memory with the Triton server: %s", error)
            return None
        try:
            self._client.register_system_shared_memory(
                region.name, f"/{region.name}", region.size_bytes, headers=self._headers, client_timeout=connect_s
            )
            return region
        except InferenceServerException as error:
            _log.info("no shared memory with the Triton server: %s", error.message())
            return None
        finally:
            region.unlink()


class _Region:
    """Shared memory for one request in flight: pixels first, then the outputs one after another."""

    def __init__(self, model: ServedModel) -> None:
        """Raises OSError where it cannot be had; the pages are reserved, so that no later write finds it full."""
        height, width = model.image_size
        self.name = f"patchstream-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._pixel_bytes = model.max_batch_size * height * width * 3
        self.size_bytes = self._pixel_bytes + sum(
            model.max_batch_size * size * _FLOAT32_BYTES for _, size in model.outputs
        )
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(handle, 0, self.size_bytes)
            self._memory = mmap.mmap(handle, self.size_bytes)
        except OSError:
            self.unlink()
            raise
        finally:
            os.close(handle)

    @property
    def _path(self) -> str:
        return f"{SHARED_MEMORY_FOLDER}/{self.name}"

    def unlink(self) -> None:
        os.unlink(self._path)

    def place(self, request: Any, outputs: list[Any], pixels: npt.NDArray[np.uint8], model: ServedModel) -> None:
        """Write the pixels, and point the request at them and its outputs at the rest."""
        view = np.frombuffer(self._memory, np.uint8, pixels.size).reshape(pixels.shape)
        np.copyto(view, pixels)
        request.set_shared_memory(self.name, pixels.size)
        offset = self._pixel_bytes
        for output, (_, size) in zip(outputs, model.outputs, strict=True):
            output.set_shared_memory(self.name, len(pixels) * size * _FLOAT32_BYTES, offset=offset)
            offset += model.max_batch_size * size * _FLOAT32_BYTES

    def read(self, count: int, model: ServedModel) -> dict[str, npt.NDArray[np.float32]]:
        """Copies of the outputs of `count` rows."""
        found, offset = {}, self._pixel_bytes
        for name, size in model.outputs:
            found[name] = np.frombuffer(self._memory, np.float32, count * size, offset).reshape(count, size).copy()
            offset += model.max_batch_size * size * _FLOAT32_BYTES
        return found


def is_this_host(host: str) -> bool:
    """Whether `host` names this machine, so that shared memory is worth trying."""
    return host.lower() in _LOOPBACK or host.lower() == socket.gethostname().lower()


def _as_rows(result: Any, name: str, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    values = result.as_numpy(name)
    if values is None or values.shape != shape:
        there = "nothing" if values is None else f"shape {list(values.shape)}"
        raise ServerError(f"output {name} has {there}, expected {list(shape)}")
    return np.asarray(values, np.float32)


def _translate(error: Any) -> Exception:
    status, message = error.status() or "", error.message() or str(error)
    if status in _REFUSED:
        return SpecError(f"the Triton server refuses the request ({status.removeprefix('StatusCode.')}): {message}")
    if status in _LATE:
        return DeadlineMissed(message)
    # While a server starts, or a model is loaded again, its models are unknown or have no version.
    if status in _AWAY or "not ready" in message or "unknown model" in message:
        return ServerAway(message)
    return ServerError(message)

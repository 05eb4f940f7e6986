"""Where a Triton server is and how to talk to it. Free of tritonclient, so that it can travel anywhere."""

from typing import NamedTuple


class TritonSettings(NamedTuple):
    """Address (`grpc://host:8001`, or `grpcs://` for TLS), model name, metadata headers and time limits in seconds."""

    url: str
    model_name: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    deadline_s: float = 60.0
    outage_s: float = 300.0
    in_flight: int = 4

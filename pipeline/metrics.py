"""What Prometheus sees of a job: counted where a fact is known, exported by Ray with its prefix `ray_`.

The names are those of deploy/grafana/metrics.json. Use and memory of GPUs are among Ray's own metrics.
"""

from collections.abc import Mapping
from functools import cache

from ray.util.metrics import Counter, Gauge

_COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "patchstream_images_total": ("images whose result is committed", ()),
    "patchstream_failures_total": ("images that became a row of failures/", ("stage",)),
    "patchstream_bytes_total": ("bytes of image files fetched", ()),
    "patchstream_stage_seconds_total": ("seconds of work, summed over workers", ("stage",)),
}
_GAUGES: Mapping[str, str] = {
    "patchstream_batch_fill": "share of the last batches that was real pictures, 0 to 1",
}


def count(name: str, amount: float, **labels: str) -> None:
    """Add `amount` to a counter. Ray's Counter refuses 0."""
    if amount > 0:
        _counter(name).inc(amount, labels)


def show(name: str, value: float) -> None:
    """Set a gauge."""
    _gauge(name).set(value)


@cache
def _counter(name: str) -> Counter:
    text, labels = _COUNTERS[name]
    return Counter(name, description=text, tag_keys=labels)


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(name, description=_GAUGES[name])

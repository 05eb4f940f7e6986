"""One Ray for the tests that run a job in this process."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest

from schemas.machines import Machines


@pytest.fixture(scope="module")
def connect() -> Iterator[Callable[[], AbstractContextManager[Machines]]]:
    """A local Ray that lives as long as the test file."""
    from cluster.session import ray_session

    with ray_session(cpus=2) as machines:
        yield lambda: nullcontext(machines)

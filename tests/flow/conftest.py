"""Pictures and a checkpoint for whole jobs, and one Ray for the tests that run a job in this process."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from schemas.machines import Machines


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 96 drawn pictures and some broken files."""
    from jobs.demo.draw import write_broken, write_pictures

    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 96, seed=11)
    write_broken(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ViT classifier, slow enough (about 30 ms an image on a core) to be caught at work."""
    from support.checkpoints import make_checkpoint

    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "vit", "vit-classifier", **shape)


@pytest.fixture(scope="module")
def connect() -> Iterator[Callable[[], AbstractContextManager[Machines]]]:
    """A local Ray that lives as long as the test file."""
    from cluster.session import ray_session

    with ray_session(cpus=2) as machines:
        yield lambda: nullcontext(machines)

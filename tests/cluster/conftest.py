"""Pictures, a checkpoint, and a Ray of several nodes on this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.nodes import LocalCluster, NodeSize, local_cluster

STORE_BYTES = 160 << 20
WORKER = NodeSize(cpus=1, store_bytes=STORE_BYTES)


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
def nodes() -> Iterator[LocalCluster]:
    """A head without a CPU and two nodes of one CPU each."""
    with local_cluster((WORKER, WORKER), head=NodeSize(cpus=0, store_bytes=STORE_BYTES)) as cluster:
        yield cluster

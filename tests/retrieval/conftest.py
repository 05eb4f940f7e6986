"""One thread each: the arrays here are small, and several test processes may share the machine."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _single_threaded() -> None:
    import faiss
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)

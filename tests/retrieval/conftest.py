"""One thread each: the arrays here are small, and several test processes may share the machine."""

from collections.abc import Callable

import pytest
import typer

from jobs import retrieve, retrieve_groups, retrieve_labels


@pytest.fixture(autouse=True, scope="session")
def _single_threaded() -> None:
    import faiss
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command of retrieval in this process; gives what it printed."""
    app = typer.Typer()
    for module in (retrieve, retrieve_groups, retrieve_labels):
        for name, function in module.COMMANDS.items():
            app.command(name)(function)

    def call(*arguments: object) -> str:
        assert app([str(argument) for argument in arguments], standalone_mode=False) in (0, None)
        return capsys.readouterr().out

    return call

"""Which code this is, so that the machines of a cluster can be held to the same."""

import hashlib
import socket
from functools import cache
from pathlib import Path
from typing import NamedTuple

from schemas.errors import ClusterError

VERSION = "0.1.0"
PACKAGES = ("schemas", "pipeline", "jobs", "cluster")


class Release(NamedTuple):
    """A version, the SHA-256 of the packages' source, and the folder and the machine that hold it."""

    version: str
    digest: str
    home: str
    host: str

    def __str__(self) -> str:
        return f"patchstream {self.version} (code {self.digest[:8]} in {self.home})"


@cache
def release() -> Release:
    """The code that this process runs."""
    home = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((home / package).rglob("*.py")):
            digest.update(f"{path.relative_to(home)}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return Release(VERSION, digest.hexdigest(), str(home), socket.gethostname())


def check_release(driver: Release) -> None:
    """Raise ClusterError where this process runs other code than `driver`: it would compute something else, or
    misread what it is sent."""
    mine = release()
    if mine[:2] != driver[:2]:
        raise ClusterError(
            f"a worker on {mine.host} has {mine}, the driver on {driver.host} has {driver}. "
            "Install the same on every node, use one image, or submit with --working-dir"
        )

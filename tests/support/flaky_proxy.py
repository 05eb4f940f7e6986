"""A proxy before an S3 or Google Cloud Storage server that fails as real ones do: now and then, and half-way."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from support.fault_control import FaultControl
from support.faults import Rule, plan_json
from support.gcs import GcsServer
from support.processes import serving
from support.s3 import S3Server

Store = TypeVar("Store", S3Server, GcsServer)


@dataclass(frozen=True)
class FlakyProxy(Generic[Store]):
    """`server` is the server behind, as it is reached through the proxy; `control` changes the faults at run time."""

    server: Store
    control: FaultControl


@contextlib.contextmanager
def flaky_proxy(
    behind: Store, rules: Iterable[Rule] = (), *, seed: int = 0, log_dir: Path
) -> Iterator[FlakyProxy[Store]]:
    """Put a proxy before a running server while the block lasts. Error bodies are those of the server's kind."""
    dialect = "s3" if isinstance(behind, S3Server) else "gcs"
    plan = json.dumps(plan_json(rules, seed))
    with serving("support.proxy_child", behind.endpoint_url, plan, dialect, log_dir=log_dir) as url:
        yield FlakyProxy(dataclasses.replace(behind, endpoint_url=url), FaultControl(url))

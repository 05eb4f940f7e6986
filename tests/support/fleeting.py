"""A store that goes away in the midst of a test, each kind in the way that its driver has an error of its own for."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.faults import Rule
from support.flaky_proxy import flaky_proxy
from support.gcs import GcsServer
from support.s3 import S3Server


@dataclass(frozen=True)
class FleetingStore:
    """`out` is an address in a new bucket, `options` lead to it until `leave` is called.

    S3 is then no more there at all, which is no OSError to botocore; Google Cloud Storage answers 401 to what concerns
    a path, which is none to gcsfs.
    """

    out: str
    options: dict[str, Any]
    leave: Callable[..., None]


@contextlib.contextmanager
def fleeting(server: S3Server | GcsServer, log_dir: Path) -> Iterator[FleetingStore]:
    """A way to `server` that can end before the block does."""
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(flaky_proxy(server, log_dir=log_dir))
        options = proxy.server.storage_options
        if isinstance(server, S3Server):
            # botocore itself would try again for ten seconds, each time.
            options["config_kwargs"] = {"retries": {"max_attempts": 0}}
            yield FleetingStore(f"s3://{server.make_bucket()}/out", {"s3": options}, stack.close)
        else:

            def deny(path: str = "*") -> None:
                proxy.control.set_rules(Rule("status", path, status=401))

            yield FleetingStore(f"gs://{server.make_bucket()}/out", {"gs": options}, deny)

"""A web server for a folder, in a process of its own, with faults to order."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from support.fault_control import FaultControl
from support.faults import Rule, plan_json
from support.processes import serving


@dataclass(frozen=True)
class HttpServer:
    """`url` has no slash at its end. `control` changes the faults and counts the requests."""

    url: str
    folder: Path

    @property
    def control(self) -> FaultControl:
        return FaultControl(self.url)

    def url_of(self, name: str) -> str:
        """The URL of a file, given by its path in the folder."""
        return f"{self.url}/{quote(name)}"


@contextlib.contextmanager
def http_server(folder: Path, rules: Iterable[Rule] = (), *, seed: int = 0, log_dir: Path) -> Iterator[HttpServer]:
    """Serve `folder` (GET, HEAD, one range, ETag, index pages) on a free loopback port while the block lasts."""
    plan = json.dumps(plan_json(rules, seed))
    with serving("support.http_child", str(folder), plan, log_dir=log_dir) as url:
        yield HttpServer(url, folder)

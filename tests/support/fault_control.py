"""What a test says to a running server that injects faults, and hears from it."""

import json
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from support.faults import WRITES, Rule, plan_json

# Straight to the loopback interface, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class FaultControl:
    """The control paths of the server at `url` (see `support/fault_server.py`)."""

    url: str

    def set_rules(self, *rules: Rule, seed: int = 0) -> None:
        """These rules from now on; none for a server in good health."""
        self._call("/__plan__", json.dumps(plan_json(rules, seed)).encode())

    def deny_writes(self) -> None:
        """403 for whatever would change something; reading goes on."""
        self.set_rules(Rule("status", methods=WRITES, status=403))

    def vanish(self) -> None:
        """404 for everything, as if somebody had deleted the bucket."""
        self.set_rules(Rule("status", status=404))

    def forget(self) -> None:
        """Empty the statistics."""
        self._call("/__forget__", b"")

    def stats(self) -> dict[str, Any]:
        """`requests` by path, `faults` by name, `most_in_flight`, `log` of [method, target, range, fault]."""
        return self._call("/__stats__")

    def requests(self, path: str | None = None) -> int:
        """How many requests came for `path` (decoded, without the query), or at all."""
        by_path: dict[str, int] = self.stats()["requests"]
        return sum(by_path.values()) if path is None else by_path.get(path, 0)

    def faults(self, names: Iterable[str] = ()) -> int:
        """How many requests were spoilt, by these faults or by any."""
        wanted = set(names)
        by_name: dict[str, int] = self.stats()["faults"]
        return sum(count for name, count in by_name.items() if not wanted or name in wanted)

    def _call(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        with _OPENER.open(urllib.request.Request(self.url + path, data=body), timeout=10) as answer:
            reply: dict[str, Any] = json.load(answer)
            return reply

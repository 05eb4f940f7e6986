"""Faults that a test server injects: which request gets which one. See `support/fault_server.py` for how.

A plan is a seed and a list of rules; the first rule that applies to a request decides. Whether a rule with a `rate`
applies is drawn from the seed, the rule, the request's method and target and how often it was asked before, so that a
plan does the same whatever the order of the threads.
"""

import dataclasses
import hashlib
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal
from urllib.parse import unquote

FaultName = Literal[
    "status",  # `status`, `headers` and `body` instead of the answer
    "reset",  # the connection is reset after `after_bytes` of the body
    "truncate",  # the declared length is right, the connection closes after `after_bytes`
    "stall",  # nothing more comes after `after_bytes`, and the connection stays open
    "slow",  # `bytes_per_s`
    "delay",  # nothing comes for `delay_s`, then the whole answer
    "cut",  # the first `after_bytes` as if they were all: a truncated file, correctly served
    "chunked",  # no length, chunked
    "no_length",  # no length, ends where the connection does
    "ignore_range",  # the whole body with 200, whatever range was asked for
    "huge",  # the body, then zeros up to `size_bytes`; with `declared` under that length, else chunked
]

WRITES = ("PUT", "POST", "DELETE", "PATCH")


@dataclass(frozen=True)
class Rule:
    """One fault and the requests that it concerns.

    `path` is a glob over the decoded path, with or without the query. `first`: only the first so many requests of each
    method and target. `rate`: a share of them. `forward` (proxy only): whether the server behind gets the request
    although the answer is spoilt, so that a write happened and its sender does not know; by default it does not for
    `status` and does for the others.
    """

    fault: FaultName
    path: str = "*"
    methods: tuple[str, ...] = ()
    first: int | None = None
    rate: float = 1.0
    forward: bool | None = None
    status: int = 503
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None
    after_bytes: int = 0
    bytes_per_s: int = 1000
    delay_s: float = 0.1
    size_bytes: int = 1 << 40
    declared: bool = True

    @property
    def reaches_upstream(self) -> bool:
        return self.fault != "status" if self.forward is None else self.forward


def throttled(retry_after_s: int = 1, **fields: Any) -> Rule:
    """429 with `Retry-After`."""
    return Rule("status", status=429, headers={"Retry-After": str(retry_after_s)}, **fields)


def plan_json(rules: Iterable[Rule], seed: int) -> dict[str, Any]:
    return {"seed": seed, "rules": [dataclasses.asdict(rule) for rule in rules]}


def rules_from_json(plan: Mapping[str, Any]) -> list[Rule]:
    return [Rule(**{**rule, "methods": tuple(rule.get("methods", ()))}) for rule in plan.get("rules", ())]


class FaultPlan:
    """The rules in force, and what happened so far. Safe to use from many threads."""

    LOG_LENGTH = 50_000

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self._lock = threading.Lock()
        self.replace(plan)
        self.forget()

    def replace(self, plan: Mapping[str, Any]) -> None:
        """Other rules from now on; each counts its requests from zero."""
        with self._lock:
            self._seed = int(plan.get("seed", 0))
            self._rules = rules_from_json(plan)
            self._asked: Counter[tuple[int, str, str]] = Counter()

    def forget(self) -> None:
        """Empty the statistics."""
        with self._lock:
            self._requests: Counter[str] = Counter()
            self._faults: Counter[str] = Counter()
            self._log: list[list[str | None]] = []
            self._in_flight = self._most_in_flight = 0

    def enter(self, method: str, target: str, byte_range: str | None) -> Rule | None:
        """Count a request and decide its fault. `leave` must follow."""
        with self._lock:
            rule = self._decide(method, target)
            path = unquote(target.partition("?")[0])
            self._requests[path] += 1
            self._in_flight += 1
            self._most_in_flight = max(self._most_in_flight, self._in_flight)
            if rule is not None:
                self._faults[rule.fault] += 1
            if len(self._log) < self.LOG_LENGTH:
                self._log.append([method, target, byte_range, rule.fault if rule else None])
            return rule

    def leave(self) -> None:
        with self._lock:
            self._in_flight -= 1

    def _decide(self, method: str, target: str) -> Rule | None:
        for index, rule in enumerate(self._rules):
            if _concerns(rule, method, target):
                self._asked[index, method, target] += 1
                number = self._asked[index, method, target]
                in_time = rule.first is None or number <= rule.first
                if in_time and _draw(self._seed, index, method, target, number) < rule.rate:
                    return rule
        return None

    def stats(self) -> dict[str, Any]:
        with self._lock:
            return {
                "requests": dict(self._requests),
                "faults": dict(self._faults),
                "most_in_flight": self._most_in_flight,
                "log": list(self._log),
            }


def _concerns(rule: Rule, method: str, target: str) -> bool:
    if rule.methods and method not in rule.methods:
        return False
    path, mark, query = target.partition("?")
    decoded = unquote(path)
    return fnmatchcase(decoded, rule.path) or fnmatchcase(f"{decoded}{mark}{unquote(query)}", rule.path)


def _draw(seed: int, index: int, method: str, target: str, number: int) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    digest = hashlib.blake2b(f"{seed} {index} {method} {target} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


Dialect = Literal["plain", "s3", "gcs"]

_S3_CODES = {
    403: "AccessDenied",
    404: "NoSuchBucket",
    409: "OperationAborted",
    429: "SlowDown",
    500: "InternalError",
    503: "SlowDown",
}


def error_body(rule: Rule, dialect: Dialect) -> tuple[str, bytes]:
    """Content type and body of a `status` fault, in the form that the clients of the store understand."""
    if rule.body is not None:
        return "text/html" if rule.body.lstrip().startswith("<html") else "text/plain", rule.body.encode()
    code = rule.code or _S3_CODES.get(rule.status, "InternalError")
    message = f"{code}: injected by the test"
    if dialect == "s3":
        return "application/xml", f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    if dialect == "gcs":
        return "application/json", f'{{"error": {{"code": {rule.status}, "message": "{message}"}}}}'.encode()
    return "text/plain", f"{rule.status} {message}\n".encode()

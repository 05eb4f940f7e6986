"""Every package that an installation brings along has its licence on the page, and none is under the GPL."""

import re
from pathlib import Path

from support.licenses import CARRIED, PAGE, closure, licence

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


def test_each_dependency_is_on_the_page() -> None:
    rows = re.findall(r"^\| ([a-z0-9][^ ]*) \| [^|]+ \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {name for name, _ in rows if name != "package"} == set(closure())
    assert not [name for name, text in rows if text == "not stated"]


def test_none_is_under_the_gpl() -> None:
    assert not [name for name in closure() if "GPL" in licence(name).removesuffix(CARRIED.get(name, ""))]


def test_each_dependency_is_pinned() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if "==" in line]
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    assert set(closure()) - pinned <= {"setuptools"}

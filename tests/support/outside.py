"""The environment outside the tests: what pytest was started in, for the one program that needs the user's settings.

Workers of pytest-xdist are started from the clean environment; conftest.py hands them what the first process noted.
"""

import os
from collections.abc import Mapping

# pip reads its configuration below HOME, and reaches an index through the proxies.
_NAMES = frozenset({"HOME", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"})
NOTED: dict[str, str] = {}


def note(environment: Mapping[str, str]) -> None:
    """Keep what the user's settings are found by."""
    NOTED.update({name: value for name, value in environment.items() if name.upper() in _NAMES})


def as_the_user() -> dict[str, str]:
    """The environment of this process with the user's home and proxies."""
    return {**os.environ, **NOTED}

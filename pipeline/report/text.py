"""Numbers as people read them, and the Jinja environment that all pages share: everything is escaped."""

import base64
import functools
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.progress import duration
from pipeline.storage import redact

TEMPLATES = Path(__file__).parent / "templates"


def thousands(value: int) -> str:
    """`1 234 567`, with narrow no-break spaces."""
    return f"{value:,}".replace(",", "\u202f")


def percent(share: float) -> str:
    """A share of one as a percentage; more than nothing never reads as 0%, nor less than all as 100%."""
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{min(share, 0.999):.1%}" if share < 1 else "100%"


def rate(value: float | None) -> str:
    """Images per second; a dash for None."""
    if value is None:
        return "–"
    return thousands(round(value)) if value >= 100 else f"{value:.1f}"


def short_name(uri: str, longest: int = 80) -> str:
    """The end of an address, which tells pictures apart better than its beginning."""
    return uri if len(uri) <= longest else f"…{uri[1 - longest :]}"


@functools.cache
def environment() -> Environment:
    """Templates of this package, with autoescape on whatever the name and an error for a name that is not given."""
    env = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    env.filters |= {
        "thousands": thousands,
        "percent": percent,
        "duration": duration,
        "rate": rate,
        "short_name": short_name,
        "redact": redact,
    }
    return env


def asset(*names: str) -> str:
    """The text of files in `templates/`, one after the other."""
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def hash_source(text: str) -> str:
    """The CSP source expression that allows an inline `<style>` or `<script>` of exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

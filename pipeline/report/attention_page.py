"""`index.html` over a folder of attention overlays: its style inside, the pictures beside it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.report.text import asset, environment, hash_source


class AttentionPicture(NamedTuple):
    """One image on the page: the name of its overlay beside the page, or the reason why there is none."""

    row: int
    uri: str
    label: str | None = None
    score: float | None = None
    file: str | None = None
    reason: str = ""


def render_attention_page(facts: Sequence[tuple[str, Any]], pictures: Sequence[AttentionPicture], origin: str) -> str:
    """The page as HTML. `origin` says whose attention is shown. Everything is escaped; nothing is fetched from afar."""
    style = asset("base.css", "attention.css")
    # Opened from a disk, a page is not of one origin with the pictures beside it.
    policy = f"default-src 'none'; img-src 'self' file:; style-src {hash_source(style)}; base-uri 'none'"
    template = environment().get_template("attention.html")
    return template.render(css=Markup(style), policy=policy, facts=facts, pictures=pictures, origin=origin)

"""A page as a browser reads it, without one."""

import json
import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text of each kind of element."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self._text: list[str] = []
        self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.inline:
            self._inside = tag
            self.inline[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag in self.inline else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.inline[self._inside][-1] += data
        else:
            self._text.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self._text))

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attrs[name] for kind, attrs in self.tags if kind == tag and name in attrs]

    def ids(self) -> set[str]:
        return {str(attrs["id"]) for _, attrs in self.tags if "id" in attrs}

    def map_data(self) -> dict[str, list[dict[str, object]]]:
        at = [attrs.get("id") for kind, attrs in self.tags if kind == "script"].index("map-data")
        data: dict[str, list[dict[str, object]]] = json.loads(self.inline["script"][at])
        return data

    def rows(self) -> list[int]:
        return [int(str(row)) for row in self.attributes("img", "data-row")]

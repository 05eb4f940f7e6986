"""A self-contained HTML page of pictures in rows. Whatever comes from outside is text, never markup."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 1.5rem; }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
ol { display: flex; flex-wrap: wrap; gap: .75rem; list-style: none; padding: 0; }
figure { margin: 0; width: 10rem; }
img, .none { width: 10rem; height: 10rem; object-fit: contain; background: #8882; border-radius: .3rem; }
.none { display: grid; place-items: center; text-align: center; font-size: .75rem; overflow: hidden; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; }
"""

# Pictures of the run are shown from `data:` addresses; nothing else may be loaded, nothing may run.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Picture:
    """One picture of a strip: the row it shows, and lines of text under it."""

    row: int
    lines: Sequence[str]


def pictures_page(
    title: str, strips: Sequence[tuple[str, Sequence[Picture]]], thumbnails: Mapping[int, str | None]
) -> str:
    """HTML of titled strips. `thumbnails` maps rows to `data:` addresses; None or absent where there is no picture."""
    sections = "\n".join(
        f"<section><h2>{escape(heading)}</h2><ol>{''.join(_item(picture, thumbnails) for picture in pictures)}</ol>"
        "</section>"
        for heading, pictures in strips
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{sections}\n</body></html>\n"
    )


def _item(picture: Picture, thumbnails: Mapping[int, str | None]) -> str:
    address = thumbnails.get(picture.row)
    text = escape(" ".join(picture.lines))
    shown = f'<img src="{escape(address)}" alt="{text}">' if address else '<div class="none">no picture</div>'
    lines = "<br>".join(escape(line) for line in picture.lines)
    return f"<li><figure>{shown}<figcaption>{lines}</figcaption></figure></li>"

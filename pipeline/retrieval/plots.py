"""Small charts as SVG, without a plotting library. They follow the reader's dark or light setting."""

from collections.abc import Sequence
from html import escape

import numpy as np
from scipy.sparse import csr_array

_MOST_CLASSES = 40
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 240, 64, 44, 34
# A program that does not know light-dark() passes over the whole declaration and keeps the plain one before it; without
# one it would fill everything with black.
_STYLE = (
    "<style>svg{color-scheme:light dark;font:12px system-ui,sans-serif}"
    "text{fill:#222;fill:light-dark(#222,#ddd)}.axis{stroke:#999;stroke:light-dark(#999,#777)}"
    ".line{fill:none;stroke:#2a78d6;stroke-width:2}.dot{fill:#2a78d6}.mark{stroke:#d6652a;stroke-dasharray:4 3}"
    ".back{fill:#fff;fill:light-dark(#fff,#181818)}</style>"
)


def line_charts(
    charts: Sequence[tuple[str, Sequence[float], Sequence[float], float]], x_name: str, *, from_zero: bool = False
) -> str:
    """Charts side by side: (title, x values, y values, x to mark). `from_zero`: the y axis starts at 0."""
    panels = "".join(
        f'<g transform="translate({number * _WIDTH},0)">{_panel(title, xs, ys, mark, x_name, from_zero)}</g>'
        for number, (title, xs, ys, mark) in enumerate(charts)
    )
    return _document(_WIDTH * len(charts), _HEIGHT + _TOP, panels, ", ".join(chart[0] for chart in charts))


def _document(width: float, height: float, body: str, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img"><title>{escape(title)}</title>{_STYLE}'
        f'<rect class="back" width="100%" height="100%"/>{body}</svg>\n'
    )


def _panel(title: str, xs: Sequence[float], ys: Sequence[float], mark: float, x_name: str, from_zero: bool) -> str:
    low, high = 0.0 if from_zero else min(ys), max(ys)
    reach, span = (max(xs) - min(xs)) or 1, (high - low) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - min(xs)) / reach * (_WIDTH - _LEFT - 24)
        return across, _TOP + (high - y) / span * (_HEIGHT - _TOP - _BOTTOM)

    points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
    floor, marked = _HEIGHT - _BOTTOM, place(mark, low)[0]
    ticks = "".join(
        f'<text x="{place(x, low)[0]:.1f}" y="{floor + 18}" text-anchor="middle">{x:g}</text>' for x in _few(xs)
    ) + "".join(
        f'<text x="{_LEFT - 8}" y="{place(xs[0], y)[1] + 4:.1f}" text-anchor="end">{y:.3g}</text>' for y in (low, high)
    )
    return (
        f'<text x="{_LEFT}" y="20" font-weight="600">{escape(title)}</text>'
        f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - 24}" y2="{floor}"/>'
        f'<line class="axis" x1="{_LEFT}" y1="{_TOP}" x2="{_LEFT}" y2="{floor}"/>'
        f'<line class="mark" x1="{marked:.1f}" y1="{_TOP}" x2="{marked:.1f}" y2="{floor}"/>'
        f'<polyline class="line" points="{line}"/>{dots}{ticks}'
        f'<text x="{(_LEFT + _WIDTH - 24) / 2}" y="{floor + 38}" text-anchor="middle">{escape(x_name)}</text>'
    )


def _few(xs: Sequence[float]) -> list[float]:
    step = -(-len(xs) // 8)
    return list(xs[::step])


def confusion(matrix: csr_array, names: Sequence[str], title: str) -> str:
    """Confusion matrix (C, C), true classes down, predicted across, shaded by the share of the true class.

    Of more than 40 classes those with the most errors are shown.
    """
    counts = matrix.sum(axis=1)
    wrong = counts + matrix.sum(axis=0) - 2 * matrix.diagonal()
    shown = sorted(np.argsort(-wrong, kind="stable")[:_MOST_CLASSES].tolist())
    part = matrix[shown][:, shown].toarray()
    share = part / np.maximum(1, counts[shown])[:, None]
    side = 22 if len(shown) > 12 else 40
    shorts = [_short(names[at]) for at in shown]
    margin = 12 + 7 * max(len(short) for short in shorts)
    top = margin + 24
    cells = "".join(
        _cell(int(part[i, j]), share[i, j], (margin + j * side, top + i * side), side, shorts[i], shorts[j])
        for i, j in np.ndindex(part.shape)
        if part[i, j]
    )
    labels = "".join(
        f'<text x="{margin - 6}" y="{top + (i + 0.65) * side:g}" text-anchor="end">{escape(short)}</text>'
        f'<text transform="translate({margin + (i + 0.65) * side:g},{top - 6}) rotate(-90)">{escape(short)}</text>'
        for i, short in enumerate(shorts)
    )
    extent = margin + side * len(shown) + 16
    more = f" (the {_MOST_CLASSES} of {len(names)} classes with the most errors)" if len(shown) < len(names) else ""
    heading = f'<text x="12" y="20" font-weight="600">{escape(title + more)}</text>'
    frame = (
        f'<rect x="{margin}" y="{top}" width="{side * len(shown)}" height="{side * len(shown)}" fill="none" '
        'class="axis"/>'
    )
    return _document(max(extent, 420), extent + 24, heading + labels + cells + frame, title)


def _cell(count: int, share: float, corner: tuple[int, int], side: int, true: str, predicted: str) -> str:
    x, y = corner
    opacity = 0.08 + 0.92 * share
    return (
        f"<g><title>{escape(f'{true} taken for {predicted}: {count}')}</title>"
        f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="#2a78d6" fill-opacity="{opacity:.2f}"/>'
        f'<text x="{x + side / 2:g}" y="{y + side * 0.65:g}" text-anchor="middle" font-size="10">{count}</text></g>'
    )


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"

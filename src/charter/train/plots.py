"""Small plots as inline SVG: no script, no network; colours come from the page's variables, for light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 560, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 34

Series = Mapping[str, Sequence[tuple[float, float]]]


def lines(series: Series, *, x: str, y: str) -> str:
    """Line plot of named series of (x, y) points.

    Args:
        series: up to four lines; a series of one point is drawn as a dot.
        x: name of the horizontal axis.
        y: name of the vertical axis.
    """
    points = [point for line in series.values() for point in line if math.isfinite(point[1])]
    if not points:
        return ""
    frame = _Frame(points)
    body = [frame.axes(x, y)]
    for index, (name, line) in enumerate(series.items()):
        found = [point for point in line if math.isfinite(point[1])]
        path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in found)
        body.append(f'<polyline class="line c{index}" points="{path}"/>')
        body += [
            f'<circle class="dot c{index}" cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="2.5"/>' for a, b in found
        ]
        if len(series) > 1:
            body.append(f'<text class="key c{index}" x="{LEFT + 8 + 110 * index}" y="{TOP + 2}">{escape(name)}</text>')
    return _svg("".join(body), f"{y} by {x}")


def intervals(rows: Sequence[tuple[str, float, float | None, float | None]], *, x: str) -> str:
    """Dot-and-whisker plot: one row a name, with value and ends of its interval.

    Args:
        rows: name, value, low and high (``None`` where there is no interval).
        x: name of the horizontal axis.
    """
    if not rows:
        return ""
    numbers = [number for _, *values in rows for number in values if number is not None]
    low, high = _padded(min(numbers), max(numbers))
    height = TOP + BOTTOM + 26 * len(rows)
    left = 120

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - RIGHT)

    body = []
    for tick in _ticks(low, high):
        body.append(
            f'<line class="grid" x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        )
        body.append(f'<text class="tick mid" x="{place(tick):.1f}" y="{height - BOTTOM + 14}">{_number(tick)}</text>')
    for index, (name, value, start, end) in enumerate(rows):
        y = TOP + 26 * index + 13
        body.append(f'<text class="tick end" x="{left - 8}" y="{y + 4}">{escape(name)}</text>')
        if start is not None and end is not None:
            body.append(f'<line class="whisker" x1="{place(start):.1f}" x2="{place(end):.1f}" y1="{y}" y2="{y}"/>')
        body.append(f'<circle class="dot c0" cx="{place(value):.1f}" cy="{y}" r="4"/>')
    body.append(f'<text class="axis mid" x="{(left + WIDTH) / 2}" y="{height - 4}">{escape(x)}</text>')
    return _svg("".join(body), x, height)


def bars(rows: Sequence[tuple[float, float, float]], *, x: str, y: str) -> str:
    """Histogram of (low, high, count)."""
    if not rows or not any(count for _, _, count in rows):
        return ""
    frame = _Frame([(rows[0][0], 0), (rows[-1][1], max(count for _, _, count in rows))], pad=False)
    body = [frame.axes(x, y)]
    for low, high, count in rows:
        top, left, right = frame.y(count), frame.x(low), frame.x(high)
        body.append(
            f'<rect class="bar" x="{left + 1:.1f}" y="{top:.1f}" width="{max(right - left - 2, 1):.1f}" '
            f'height="{frame.y(0) - top:.1f}"/>'
        )
    return _svg("".join(body), f"{y} by {x}")


class _Frame:
    """Maps data to the drawing area."""

    def __init__(self, points: Sequence[tuple[float, float]], *, pad: bool = True) -> None:
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        self._x = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
        self._y = _padded(min(ys), max(ys)) if pad or max(ys) == min(ys) else (min(ys), max(ys))

    def x(self, value: float) -> float:
        return LEFT + (value - self._x[0]) / (self._x[1] - self._x[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self._y[0]) / (self._y[1] - self._y[0]) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x: str, y: str) -> str:
        body = []
        for tick in _ticks(*self._y):
            body.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}"/>'
            )
            body.append(f'<text class="tick end" x="{LEFT - 6}" y="{self.y(tick) + 4:.1f}">{_number(tick)}</text>')
        under = HEIGHT - BOTTOM + 14
        body += [
            f'<text class="tick mid" x="{self.x(tick):.1f}" y="{under}">{_number(tick)}</text>'
            for tick in _ticks(*self._x)
        ]
        body.append(f'<text class="axis mid" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}">{escape(x)}</text>')
        turn = f"translate(11 {(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)"
        body.append(f'<text class="axis mid" transform="{turn}">{escape(y)}</text>')
        return "".join(body)


def _svg(body: str, label: str, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}"

"""Line charts as inline SVG: no script, no other file. Colors are CSS variables, so that light and dark both read."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 560, 278
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 28, 44
_MAX_X_LABELS = 8


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; None is a gap. color: 1 to 4."""

    name: str
    values: Sequence[float | None]
    color: int = 1
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line at a place on the x axis, with its word."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class Limit:
    """A horizontal line, with its word."""

    y: float
    label: str


def line_chart(
    title: str,
    x: Sequence[float],
    lines: Sequence[Line],
    *,
    x_title: str,
    y_title: str,
    x_labels: Sequence[str] | None = None,
    marks: Sequence[Mark] = (),
    limits: Sequence[Limit] = (),
    has_dots: bool = True,
) -> str:
    """One figure: heading, legend and plot. x rises; x_labels stand at its values where they are given."""
    frame = _Frame(
        [*x, *(mark.x for mark in marks)],
        [v for line in lines for v in line.values if v is not None],
        [limit.y for limit in limits],
    )
    parts = [
        *_y_axis(frame, y_title),
        *_x_axis(frame, x, x_labels, x_title),
        *(part for limit in limits for part in _limit(frame, limit)),
        *(part for mark in marks for part in _mark(frame, mark)),
        *(part for line in lines for part in _curve(frame, x, line, x_labels, has_dots)),
    ]
    legend = "".join(
        f'<span class="key"><i class="{_classes(line)}"></i>{html.escape(line.name)}</span>' for line in lines
    )
    return (
        f'<figure><figcaption><b>{html.escape(title)}</b><span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def _classes(line: Line) -> str:
    return f"c{line.color} dashed" if line.is_dashed else f"c{line.color}"


class _Frame:
    """Maps values to places in the picture; the y axis begins at 0."""

    def __init__(self, x: Sequence[float], y: Sequence[float], more_y: Sequence[float]) -> None:
        self.x_low, self.x_high = min(x, default=0.0), max(x, default=1.0)
        highest = max(y, default=0.0)
        # A limit far above everything measured would flatten the curves; it is left out of the picture then.
        highest = max([highest, *(value for value in more_y if value <= 2 * highest)])
        self.step = nice_step(highest or 1.0)
        self.y_high = self.step * max(1, math.ceil((highest or 1.0) / self.step - 1e-9))

    def px(self, x: float) -> float:
        span = self.x_high - self.x_low
        share = (x - self.x_low) / span if span else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def py(self, y: float) -> float:
        return _HEIGHT - _BOTTOM - y / self.y_high * (_HEIGHT - _TOP - _BOTTOM)


def nice_step(highest: float) -> float:
    """The distance of the grid's lines: 1, 2 or 5 times a power of ten, at most six of them."""
    rough = highest / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def number(value: float | None) -> str:
    """A figure with three significant digits; a dash for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def _y_axis(frame: _Frame, title: str) -> list[str]:
    parts = [f'<text class="axis" x="4" y="11">{html.escape(title)}</text>']
    for n in range(round(frame.y_high / frame.step) + 1):
        y = frame.py(n * frame.step)
        kind = "base" if n == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{n * frame.step:g}</text>')
    return parts


def _x_axis(frame: _Frame, x: Sequence[float], labels: Sequence[str] | None, title: str) -> list[str]:
    y = _HEIGHT - _BOTTOM + 17
    if labels is not None:
        every = math.ceil(len(labels) / _MAX_X_LABELS)
        ticks = [(x[n], labels[n]) for n in range(0, len(labels), every)]
    else:
        step = nice_step(max(frame.x_high, 1e-9))
        ticks = [(n * step, f"{n * step:g}") for n in range(int(frame.x_high / step) + 1) if n * step >= frame.x_low]
    parts = [
        f'<text x="{frame.px(at):.1f}" y="{y}" text-anchor="middle">{html.escape(text)}</text>' for at, text in ticks
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return [
        *parts,
        f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(title)}</text>',
    ]


def _mark(frame: _Frame, mark: Mark) -> list[str]:
    x = frame.px(mark.x)
    is_right = x > _WIDTH * 0.7
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>',
        f'<text class="word" x="{x + (-5 if is_right else 5):.1f}" y="{_TOP + 9}"'
        f' text-anchor="{"end" if is_right else "start"}">{html.escape(mark.label)}</text>',
    ]


def _limit(frame: _Frame, limit: Limit) -> list[str]:
    if limit.y > frame.y_high:
        return []
    y = frame.py(limit.y)
    return [
        f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text class="word" x="{_LEFT + 5}" y="{y - 5:.1f}">{html.escape(limit.label)}</text>',
    ]


def _curve(frame: _Frame, x: Sequence[float], line: Line, labels: Sequence[str] | None, has_dots: bool) -> list[str]:
    parts, path = [], []
    for n, value in enumerate(line.values):
        if value is None:
            continue
        is_first = n == 0 or line.values[n - 1] is None
        path.append(f"{'M' if is_first else 'L'}{frame.px(x[n]):.1f} {frame.py(value):.1f}")
        is_alone = is_first and (n + 1 == len(line.values) or line.values[n + 1] is None)
        if has_dots or is_alone:
            where = labels[n] if labels is not None else f"{x[n]:g}"
            parts.append(
                f'<circle class="c{line.color}" cx="{frame.px(x[n]):.1f}" cy="{frame.py(value):.1f}" r="3.5">'
                f"<title>{html.escape(line.name)} at {html.escape(where)}: {number(value)}</title></circle>"
            )
    return [f'<path class="{_classes(line)}" d="{"".join(path)}"/>', *parts] if path else []

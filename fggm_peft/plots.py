"""Draws: a few kinds of plots in one style, from plain lists; as files, or as SVG that stands in a page.

matplotlib is imported when something is drawn. Whatever text is given comes out as it is: no mathematics in ``$``, no
markup. The same input gives the same bytes. None in a list is a value that is missing; it is left out.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .continual.report.inline_svg import inline_svg
from .continual.report.names_beside_points import write_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Value = float | None
F = TypeVar("F", bound=Callable[..., Any])

INK, FAINT = "#1f2933", "#8a929c"
WIDTH = 3.7  # inches: at 9 points the text is legible where a phone shows the whole figure
# Okabe and Ito's colours, told apart by colour-blind readers; without the yellow, which white paper swallows
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, "#8d6e63")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">", "*")
LINES = ("-", "--", ":", "-.")
PALE_TO_DEEP = ("#f2f5f9", "#bcd6e8", "#6ba3c8", "#2f6a9f", "#143559")
HATCHES = ("", "////", "....", "xx")
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",  # text stays text: a tenth of the size, and it can be searched
    "svg.hashsalt": "fggm",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it along: the same layout on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Look:
    """How one series looks in every plot: colour, marker and line together tell 96 series apart."""

    color: str
    marker: str
    line: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name, in their order; the first eight have different colours, and twelve different markers."""
    return {
        name: Look(COLORS[n % len(COLORS)], MARKERS[n % len(MARKERS)], LINES[n // len(COLORS) % len(LINES)])
        for n, name in enumerate(names)
    }


def plain(text: object) -> str:
    """The text without what no SVG can hold: control characters and halves of surrogate pairs become a mark."""
    return re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(text))


def shortened(text: object, length: int = 16) -> str:
    """The text, or its beginning and its end: names of one family often differ in the end only."""
    clean = plain(text)
    end = (length - 1) // 3
    return clean if len(clean) <= length else f"{clean[: length - 1 - end]}…{clean[len(clean) - end :]}"


@contextmanager
def style() -> Iterator[None]:
    """matplotlib in this module's style, for what is drawn within.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fggm-peft[continual]'") from error
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # the reader's fonts have the glyphs that DejaVu has not: text is laid out again where it is shown
        warnings.filterwarnings("ignore", message=".*[Gg]lyph .* missing from")
        yield


def _styled(draw: F) -> F:
    @functools.wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> Any:
        with style():
            return draw(*arguments, **options)

    return drawn  # type: ignore[return-value]


@_styled
def new_figure(height: float, width: float = WIDTH, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure (in inches) and its axes, row by row. It belongs to nobody: no window, no state to close."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


# --- kinds of plots ------------------------------------------------------------------------------


@_styled
def titles(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Title, and names of the axes."""
    axes.set_title(plain(title), loc="left")
    axes.set_xlabel(plain(x))
    axes.set_ylabel(plain(y))


@_styled
def heat_map(
    axes: Axes,
    values: Sequence[Sequence[Value]],
    rows: Sequence[str],
    columns: Sequence[str],
    low: float | None = None,
    high: float | None = None,
    scale: str = "",
) -> None:
    """Cells from pale to deep with their values in them, the first row on top; white where one is missing.

    Args:
        values: ``[rows][columns]``. Beyond twelve columns there is no room for them; a colour bar takes their place.
        low, high: ends of the colours; None: those of the values.
        scale: what the colours mean, written along a colour bar; empty for none where the values are in the cells.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    grid = np.array([[math.nan if v is None else v for v in row] for row in values], dtype=float)
    known = grid[np.isfinite(grid)]
    low = min(known, default=0.0) if low is None else low
    high = max(known, default=1.0) if high is None else high
    colors = LinearSegmentedColormap.from_list("", PALE_TO_DEEP)
    mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap=colors, vmin=low, vmax=high, linewidth=0)
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks([n + 0.5 for n in range(len(rows))], [shortened(name) for name in rows])
    axes.set_xticks([n + 0.5 for n in range(len(columns))], [shortened(name) for name in columns])
    axes.tick_params(axis="x", rotation=90 if _are_upright(columns) else 0)
    if scale or len(columns) > 12:
        bar = axes.figure.colorbar(mesh, ax=axes, shrink=0.8 if len(rows) > 4 else 1.0)
        bar.set_label(plain(scale))
        bar.outline.set_visible(False)  # type: ignore[operator]
    if len(columns) > 12:
        return
    size = 9 if len(columns) <= 8 else 7
    for (row, column), value in np.ndenumerate(grid):
        if math.isfinite(value):
            color = "#ffffff" if value > low + 0.62 * (high - low) else "#16202b"
            axes.text(column + 0.5, row + 0.5, _brief(value), ha="center", va="center", fontsize=size, color=color)


def heat_map_height(rows: int, columns: Sequence[str]) -> float:
    """Inches for a heat map whose cells have room for their values, and the columns for their names."""
    longest = max(len(shortened(name)) for name in columns)
    return 0.35 + 0.27 * max(rows, 2) + (0.075 * longest if _are_upright(columns) else 0.15)


def _are_upright(columns: Sequence[str]) -> bool:
    return sum(len(shortened(name)) for name in columns) > 26


def _brief(value: float) -> str:
    """Two digits and no zero before the point: .59, 1.0, 42.5; what would round to zero is <.01, and zero is 0."""
    if not value:
        return "0"
    if abs(value) >= 0.995:
        return f"{value:.1f}"
    if abs(value) < 0.005:
        return "<.01" if value > 0 else ">-.01"
    return f"{value:.2f}".replace("0.", ".", 1)


@_styled
def lines(axes: Axes, x: Sequence[float], series: Mapping[str, Sequence[Value]], styles: Mapping[str, Look]) -> None:
    """One line for each name over ``x``, with markers; a value that is missing is bridged."""
    for name, values in series.items():
        known = [(place, value) for place, value in zip(x, values, strict=True) if value is not None]
        color, marker, line = astuple(styles[name])
        options: dict[str, Any] = {"markersize": 4, "markeredgewidth": 0, "linewidth": 1.3}
        axes.plot(*zip(*known, strict=True), color=color, marker=marker, linestyle=line, **options)


@_styled
def falling(axes: Axes, series: Mapping[str, Sequence[tuple[float, float]]], bold: Mapping[str, float]) -> None:
    """Falling curves over shares on log axes, each bold up to a place and thin behind it, with a mark where it changes.

    Args:
        series: name -> points (share in (0, 1], y > 0).
        bold: name -> the x up to which its curve is bold.
    """
    styles = looks(list(series))
    for name, points in series.items():
        color, marker, line = astuple(styles[name])
        places, values = zip(*points, strict=True)
        axes.plot(places, values, color=color, linestyle=line, linewidth=0.8, alpha=0.7)
        if before := [(x, y) for x, y in points if x <= bold[name]]:
            axes.plot(*zip(*before, strict=True), color=color, linestyle=line, linewidth=2.2)
            axes.plot(*before[-1], color=color, marker=marker, markersize=5, markeredgewidth=0, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    # matplotlib's own labels on log axes are mathematics, which this style does not parse
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter("")


@_styled
def doubling(axes: Axes, places: Sequence[int], levels: Mapping[str, float]) -> None:
    """An x axis on which every doubling is as long, with a tick at each place, and named levels of y.

    Args:
        places: numbers > 0; their ticks are left out where they would touch.
        levels: name -> y, a faint line with its name on it.
    """
    axes.set_xscale("log", base=2)
    shown = [place for n, place in enumerate(places) if not n or math.log2(place / places[n - 1]) > 0.4]
    axes.set_xticks(shown, [f"{place:,}" for place in shown])
    axes.minorticks_off()
    for name, y in levels.items():
        axes.axhline(y, color=INK, linewidth=0.9, linestyle=(0, (5, 3)))
        axes.annotate(plain(name), (0, y), (3, 2), ("axes fraction", "data"), "offset points", ha="left", va="bottom")


@_styled
def legend(axes: Axes, names: Sequence[str]) -> None:
    """The looks of the series of these names, above the figure, as many in a line as have room."""
    from matplotlib.lines import Line2D

    labels = [shortened(name, 22) for name in names]
    parts: list[dict[str, Any]] = [asdict(look) for look in looks(names).values()]
    handles = [Line2D([], [], linestyle=part.pop("line"), **part, markersize=4, markeredgewidth=0) for part in parts]
    room = int(46 * axes.figure.bbox.width / axes.figure.dpi / WIDTH)  # characters
    columns = max(1, min(len(labels), room // (max(map(len, labels)) + 7)))
    place: dict[str, Any] = {"loc": "outside upper left", "ncols": columns, "handlelength": 2.2, "columnspacing": 1.2}
    axes.figure.legend(handles, labels, frameon=False, **place)


@dataclass(frozen=True)
class Spot:
    """A point of a plot of points.

    Args:
        x, y: where it is.
        look: of its series.
        name: written beside it; empty for none.
        spread: half-lengths of the bars through it, (x, y); None for no bar.
        is_full: filled, or hollow and smaller.
    """

    x: float
    y: float
    look: Look
    name: str = ""
    spread: tuple[Value, Value] = (None, None)
    is_full: bool = True


@_styled
def points(axes: Axes, spots: Sequence[Spot], front: Sequence[tuple[float, float]] = ()) -> None:
    """Points with their spread; names are put where they cover least.

    Args:
        front: corners of a line behind the points, such as a Pareto front.
    """
    if front:
        corners = sorted(front)
        axes.plot([x for x, _ in corners], [y for _, y in corners], color=FAINT, linewidth=3, alpha=0.35, zorder=1)
    for spot in spots:
        x_half, y_half = spot.spread
        bars = {"ecolor": spot.look.color, "elinewidth": 0.9, "alpha": 0.45}
        axes.errorbar(spot.x, spot.y, yerr=y_half, xerr=x_half, fmt="none", **bars)  # type: ignore[arg-type]
        axes.plot(
            spot.x,
            spot.y,
            marker=spot.look.marker,
            color=spot.look.color,
            markersize=7.5 if spot.is_full else 5,
            fillstyle="full" if spot.is_full else "none",
            markeredgewidth=0.9,
            linestyle="none",
            zorder=3,
        )
    axes.margins(0.09)
    write_names(axes, [(spot.x, spot.y, shortened(spot.name)) for spot in spots], FAINT)


@_styled
def bars(axes: Axes, names: Sequence[str], parts: Mapping[str, Sequence[Value]], stacked: bool = False) -> None:
    """Lying bars, the first name on top; several parts side by side or, of one whole, stacked, with a legend."""
    thickness = 0.68 if stacked else 0.78 / len(parts)
    starts = [0.0] * len(names)
    for number, (part, values) in enumerate(parts.items()):
        known = [value or 0.0 for value in values]
        shift = 0.0 if stacked else (number - (len(parts) - 1) / 2) * thickness
        axes.barh(
            [row + shift for row in range(len(names))],
            known,
            thickness,
            left=starts if stacked else 0,
            label=plain(part),
            color=COLORS[number % len(COLORS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="#ffffff",
            linewidth=0.4,
        )
        starts = [start + value for start, value in zip(starts, known, strict=True)]
    _name_rows(axes, names)
    if len(parts) > 1:
        axes.figure.legend(loc="outside upper left", ncols=min(len(parts), 3), frameon=False, handlelength=1.4)


@_styled
def intervals(
    axes: Axes,
    names: Sequence[str],
    means: Sequence[float],
    ends: Sequence[tuple[float, float] | None],
    clear: Sequence[bool],
) -> None:
    """Means with intervals about zero, the first name on top; those that leave zero out are full and dark."""
    axes.axvline(0, color=INK, linewidth=0.9)
    for row, (mean, end, is_clear) in enumerate(zip(means, ends, clear, strict=True)):
        color = COLORS[0] if is_clear else FAINT
        if end is not None:
            axes.plot(end, [row, row], color=color, linewidth=2.2, solid_capstyle="butt")
        axes.plot(
            mean, row, marker="o", color=color, markersize=6, markerfacecolor=color if is_clear else "none", zorder=3
        )
    _name_rows(axes, names)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shortened(name, 22) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)


# --- out -----------------------------------------------------------------------------------------


@_styled
def save(figure: Figure, path: Path | str) -> None:
    """Write the figure on white; the suffix says as what (svg, png, pdf)."""
    date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(Path(path).suffix, {})
    figure.savefig(path, dpi=160, facecolor="white", metadata=date)


@_styled
def to_svg(figure: Figure, name: str = "figure", alt: str = "") -> str:
    """The figure as an ``<svg>`` element for a page: it scales, and its ink is the page's text colour.

    Args:
        name: goes before every id, so that the figures of a page do not take each other's.
        alt: what it shows, for those who do not see it.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return inline_svg(file.getvalue(), plain(name), plain(alt), INK)

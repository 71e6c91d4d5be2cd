"""The kinds of plots that reports consist of, in one style.

The functions take plain values; None is a missing value. matplotlib and seaborn are imported when something is drawn.
Text is drawn literally, without mathematics between ``$``. Equal input gives equal bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Look = dict[str, Any]
"""Keyword arguments of ``Axes.plot``: color, marker and linestyle of one series."""

INK, FAINT = "#1f2933", "#8a929c"
WIDTH = 3.7  # inches: at 9 points the text is legible when a phone shows the whole figure
# the palette of Okabe and Ito, which color-blind readers can distinguish, without its yellow
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, "#8d6e63")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">", "*")
LINES = ("-", "--", ":", "-.")
STYLE = Path(__file__).with_suffix(".mplstyle")
_NAMESPACE = ' xmlns="http://www.w3.org/2000/svg" version="1.1"'


@contextmanager
def style() -> Iterator[None]:
    """Context manager and decorator: matplotlib draws in this module's style."""
    try:
        import adjustText  # noqa: F401
        import matplotlib
        import seaborn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"plots need {error.name}: pip install 'fggm-peft[continual]'") from error
    settings: Any = matplotlib.rc_params_from_file(STYLE, use_default_template=False)
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # a browser lays text out again, with fonts that have the glyphs which DejaVu lacks
        warnings.filterwarnings("ignore", message=".*[Gg]lyph .* missing from")
        yield


@style()
def new_figure(height: float, width: float = WIDTH, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure in inches that is not registered with pyplot, and its axes, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, squeeze=False).flat)


@style()
def save(figure: Figure, path: Path | str) -> None:
    """Write the figure on white; the suffix sets the format (svg, png, pdf)."""
    date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(Path(path).suffix, {})
    figure.savefig(path, dpi=160, facecolor="white", metadata=date)


@style()
def to_svg(figure: Figure, alt: str) -> str:
    """The figure as an ``<svg>`` element of an HTML page. It scales, and its ink is the text color of the page.

    Args:
        alt: text alternative. It has to differ between the figures of a page, because ids are derived from it.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": sha256(alt.encode(errors="replace")).hexdigest()}):
        figure.savefig(file, format="svg", transparent=True)
    svg = re.sub(r"(?s)<metadata>.*?</metadata>|<style.*?</style>", "", file.getvalue())
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg).replace(INK, "currentColor")  # nothing refers to a group
    head = f'<svg role="img" aria-label="{escape(plain(alt))}" viewBox='
    return re.sub(r">\s*\n\s*<", "><", head + svg.partition(" viewBox=")[2].replace(_NAMESPACE, "", 1)).strip()


# --- text and looks ------------------------------------------------------------------------------


def plain(text: object) -> str:
    """The text with a mark in place of characters that SVG cannot contain."""
    return re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(text))


def shortened(text: object, length: int = 16) -> str:
    """The text, or its beginning and its end: similar names often differ only at the end."""
    clean = plain(text)
    end = (length - 1) // 3
    return clean if len(clean) <= length else f"{clean[: length - 1 - end]}…{clean[len(clean) - end :]}"


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name. Color, marker and line together distinguish 96 series."""
    return {
        name: {
            "color": COLORS[n % len(COLORS)],
            "marker": MARKERS[n % len(MARKERS)],
            "linestyle": LINES[n // len(COLORS) % len(LINES)],
        }
        for n, name in enumerate(names)
    }


@style()
def legend(axes: Axes) -> None:
    """The labels of the axes, above the figure."""
    longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
    axes.figure.legend(loc="outside upper left", ncols=max(1, 46 // (longest + 7)), columnspacing=1.2)


# --- kinds of plots ------------------------------------------------------------------------------


@style()
def heat_map(
    axes: Axes,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    low: float | None = None,
    high: float | None = None,
    scale: str = "",
    has_values: bool | None = None,
) -> None:
    """Cells with their values, the first row on top; a missing value leaves its cell empty.

    Args:
        values: ``[rows][columns]``; None or NaN is a missing value.
        low, high: the ends of the colors; None: those of the values.
        scale: label of the color bar; empty: no color bar, unless the cells have no values.
        has_values: whether the cells have values; None: with at most twelve columns. More columns need a wider figure.
    """
    import pandas
    import seaborn

    has_values = len(columns) <= 12 if has_values is None else has_values
    cells = [["" if pandas.isna(value) else _cell(value) for value in row] for row in values]
    data = pandas.DataFrame(values, list(map(shortened, rows)), list(map(shortened, columns)), dtype=float)
    seaborn.heatmap(
        data,
        vmin=low,
        vmax=high,
        cmap=seaborn.light_palette(COLORS[0], 40),
        annot=cells if has_values else False,
        fmt="",
        annot_kws={"fontsize": 9 if len(columns) <= 8 else 7},
        cbar=not has_values or bool(scale),
        cbar_kws={"label": scale},
        ax=axes,
    )
    axes.grid(False)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", rotation=0)


def _cell(value: float) -> str:
    """1.0, .59, .50; a small value keeps one digit, so that only zero is shown as 0."""
    if abs(value) >= 0.995:
        return f"{value:.1f}"
    return (f"{value:.2f}" if abs(value) >= 0.005 else f"{value + 0.0:.1g}").replace("0.", ".", 1)


def heat_map_height(rows: int, columns: Sequence[str]) -> float:
    """Inches for a heat map, including the names of its columns, which are upright if they are long."""
    lengths = [len(shortened(name)) for name in columns]
    return 0.35 + 0.27 * max(rows, 2) + (0.075 * max(lengths) if sum(lengths) > 26 else 0.15)

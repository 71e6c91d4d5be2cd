"""Writes names beside the points of a plot, where they cover least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

Point = tuple[float, float, str]
"""Where it is, and its name; empty for none."""

SIDES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
PLACES = [(reach * dx, reach * dy) for reach in (6, 14, 24, 38, 54) for dx, dy in SIDES]
"""Where a name may stand, seen from its point: offsets in points of print, nearest first."""


def write_names(axes: Axes, points: Sequence[Point], faint: str) -> None:
    """Each name at the first place that covers nothing, or else the one that covers least.

    Args:
        points: all of them, also those without a name, which should not be covered.
        faint: colour of the line to a name that is not right beside its point.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    if not any(name for _, _, name in points):
        return
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # places are known in print only after the layout
    half = 5 * axes.figure.dpi / 72  # of a marker
    frame = axes.get_window_extent()
    centers = [axes.transData.transform((x, y)) for x, y, _ in points]
    covered = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centers]

    def box_of(text: Any) -> Bbox:
        text.get_window_extent()  # puts the text in its place, and measures it with its line
        return Text.get_window_extent(text)

    def cost(text: Text) -> float:
        box = box_of(text)
        outside = box.width * box.height - _shared_area(box, frame)
        return sum(_shared_area(box, other) for other in covered) + 3 * outside

    for point in points:
        if not point[2]:
            continue
        found: list[tuple[float, Text]] = []
        for place in PLACES:
            text = _name_at(axes, point, place, faint)
            found.append((cost(text), text))
            if found[-1][0] < 1e-9:
                break
        best = min(range(len(found)), key=lambda number: found[number][0])
        for number, (_, text) in enumerate(found):
            if number != best:
                text.remove()
        covered.append(box_of(found[best][1]))


def _name_at(axes: Axes, point: Point, place: tuple[int, int], faint: str) -> Any:
    """The name of a point beside it; with a thin line to it where it is not right beside."""
    line = {"arrowstyle": "-", "color": faint, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    text = axes.annotate(
        point[2],
        point[:2],
        place,
        textcoords="offset points",
        ha="left" if place[0] > 0 else "right" if place[0] else "center",
        va="bottom" if place[1] > 0 else "top" if place[1] else "center",
        arrowprops=line if max(map(abs, place)) > 6 else None,
    )
    text.set_in_layout(False)  # the layout is made; a name must not move what its place was chosen by
    return text


def _shared_area(a: Any, b: Any) -> float:
    """Of what two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)

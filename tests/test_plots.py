"""Every kind of plot draws what it is given, and text comes out as text."""

from __future__ import annotations

import html
import re
import sys

import pytest

from fggm_peft import plots as plotting
from fggm_peft.plots import (
    INK,
    Look,
    Spot,
    bars,
    doubling,
    falling,
    heat_map,
    intervals,
    legend,
    lines,
    looks,
    new_figure,
    plain,
    points,
    save,
    shortened,
    titles,
    to_svg,
)

HOSTILE = ["<script>x</script>", "$x^2$", "a_b", "&amp;", "\\frac", "%s {0}", "日本"]
LOOK = Look("#0072b2", "o", "-")


def drawn(kind, names=("a", "b", "c")):
    figure, (axes,) = new_figure(2.5)
    names = list(names)
    numbers = [float(n) for n in range(len(names))]
    DRAW[kind](axes, names, numbers)
    return figure, axes


DRAW = {
    "heat map": lambda axes, names, numbers: heat_map(axes, [numbers] * 2, names[:2], names),
    "lines": lambda axes, names, numbers: (
        lines(axes, numbers, {names[0]: numbers}, {names[0]: LOOK}),
        titles(axes, *names[:3]),
    ),
    "falling": lambda axes, names, numbers: (
        falling(axes, {names[0]: [(0.1, 2.0), (1.0, 1.0)]}, {names[0]: 0.1}),
        legend(axes, names),
    ),
    "doubling": lambda axes, names, numbers: (
        doubling(axes, [1, 2, 4], {names[0]: 0.5, names[1]: 0.6, names[2]: 0.7}),
        axes.plot([1, 2, 4], numbers),
    ),
    "points": lambda axes, names, numbers: points(
        axes, [Spot(n, n, LOOK, name) for n, name in zip(numbers, names, strict=True)]
    ),
    "bars": lambda axes, names, numbers: bars(axes, names, {names[0]: numbers, names[1]: numbers}),
    "intervals": lambda axes, names, numbers: intervals(
        axes, names, numbers, [None] * len(names), [False] * len(names)
    ),
}


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("kind", DRAW)
def test_text_in_a_plot_is_text(kind):
    for first in range(0, len(HOSTILE) - 2, 2):
        names = HOSTILE[first : first + 3]
        svg = to_svg(drawn(kind, names)[0], alt="<b>")
        escaped = [name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for name in names]
        for name in escaped:
            assert any(text == name or "…" in text for text in texts(svg)), (kind, name)
        assert "<script" not in svg and 'aria-label="&lt;b&gt;"' in svg


@pytest.mark.parametrize("kind", DRAW)
def test_the_same_plot_has_the_same_bytes(kind, tmp_path):
    assert to_svg(drawn(kind)[0]) == to_svg(drawn(kind)[0])
    for suffix in ("svg", "pdf", "png"):
        for name in ("one", "two"):
            save(drawn(kind)[0], tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


@pytest.mark.parametrize("kind", DRAW)
def test_an_element_for_a_page_scales_and_takes_the_colour_of_its_text(kind):
    svg = to_svg(drawn(kind)[0], "name")
    head = re.match(r"<svg [^>]*>", svg)[0]
    assert "viewBox" in head and " width" not in head and " height" not in head
    assert "currentColor" in svg and INK not in svg
    assert not re.search(r"<style|<metadata|https?:|<image", svg)
    ids = re.findall(r' id="([^"]*)"', svg)
    assert all(name.startswith("name-") for name in ids)
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', svg)) == set(ids)


def test_a_heat_map_has_its_values_in_its_cells_and_nothing_where_one_is_missing():
    figure, (axes,) = new_figure(2.5)
    heat_map(axes, [[0.125, None], [1.0, -0.5]], ["r", "s"], ["c", "d"])
    svg = to_svg(figure)
    assert [text for text in texts(svg) if text not in "rscd"] == [".12", "1.0", "-.50"]
    assert svg.count("fill: none") >= 1


def test_a_small_value_in_a_cell_is_not_taken_for_zero():
    figure, (axes,) = new_figure(2.5)
    heat_map(axes, [[0.004, 0.0], [-0.004, 0.005], [1e-9, -0.0]], ["r", "s", "t"], ["c", "d"])
    found = [text for text in texts(to_svg(figure)) if text not in "rstcd"]
    assert [html.unescape(text) for text in found] == ["<.01", "0", ">-.01", ".01", "<.01", "0"]


def test_a_heat_map_of_many_columns_has_a_colour_bar_instead():
    figure, (axes,) = new_figure(2.5)
    heat_map(axes, [[0.37] * 13, [0.51] * 13], ["r", "s"], [f"c{n}" for n in range(13)])
    assert len(figure.axes) == 2 and ".37" not in texts(to_svg(figure))


def test_a_scale_of_colours_is_named_also_where_the_values_are_in_the_cells():
    figure, (axes,) = new_figure(2.5)
    heat_map(axes, [[0.37] * 3], ["r"], ["c", "d", "e"], 0.0, 1.0, scale="a <share>")
    assert {"a &lt;share&gt;", ".37"} <= set(texts(to_svg(figure)))


def test_a_falling_curve_is_bold_up_to_a_place_and_its_axes_have_plain_labels():
    figure, (axes,) = new_figure(2.5)
    points = [(0.001, 30.0), (0.1, 3.0), (1.0, 0.01)]
    falling(axes, {"a": points, "b": points}, {"a": 0.1, "b": 0.0001})
    widths = [(len(line.get_xdata()), line.get_linewidth()) for line in axes.lines]
    assert [length for length, width in widths if width > 2] == [2]  # nothing of b is bold
    assert {"10 %", "100 %", "1", "10"} <= set(texts(to_svg(figure))) and "mathdefault" not in to_svg(figure)


def test_ticks_that_would_touch_are_left_out_and_levels_are_named():
    figure, (axes,) = new_figure(2.5)
    lines(axes, [32, 64, 70], {"a": [0.1, 0.2, 0.3]}, {"a": LOOK})
    doubling(axes, [32, 64, 70], {"enough": 0.25})
    found = texts(to_svg(figure))
    assert {"32", "64", "enough"} <= set(found) and "70" not in found


def test_a_legend_stays_within_the_figure():
    figure, (axes,) = new_figure(3.0)
    axes.plot([0, 1], [0, 1])
    legend(axes, [f"a_rather_long_name.{n}" for n in range(7)])
    figure.draw_without_rendering()
    box, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1


def test_values_that_are_missing_are_bridged_in_lines_and_nothing_in_bars():
    _, (axes,) = new_figure(2.0)
    lines(axes, [0, 1, 2], {"a": [1.0, None, 3.0], "b": [None, None, None]}, {"a": LOOK, "b": LOOK})
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 2]]
    _, (axes,) = new_figure(2.0)
    bars(axes, ["a", "b"], {"x": [1.0, None], "y": [2.0, 3.0]}, stacked=True)
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 1), (0, 0), (1, 2), (0, 3)]


def test_intervals_that_leave_zero_out_are_full():
    _, (axes,) = new_figure(2.0)
    intervals(axes, ["a", "b"], [1.0, 0.1], [(0.5, 1.5), (-1.0, 1.2)], [True, False])
    markers = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() != "none" for line in markers] == [True, False]
    assert [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2][1:] == [
        [0.5, 1.5],
        [-1.0, 1.2],
    ]


def test_names_beside_points_do_not_cover_each_other_or_leave_the_plot():
    figure, (axes,) = new_figure(3.4, width=4.0)
    spots = [Spot(0.04 * n, 0.5 + 0.01 * (n % 3), LOOK, f"method-{n}") for n in range(10)]
    points(axes, [*spots, Spot(1.0, 1.0, LOOK, "corner")])
    from matplotlib.text import Text

    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 11
    frame = axes.get_window_extent()
    assert all(frame.fully_containsx(x) for box in boxes for x in (box.x0, box.x1))
    assert all(frame.fully_containsy(y) for box in boxes for y in (box.y0, box.y1))
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_series_are_told_apart_by_more_than_their_colour():
    found = list(looks([str(n) for n in range(96)]).values())
    assert len(set(found)) == 96
    assert len({look.color for look in found[:8]}) == 8 and len({look.marker for look in found[:12]}) == 12


def test_long_names_keep_their_end_and_control_characters_become_a_mark():
    assert shortened("fggm-element-density-0.05") == "fggm-eleme…-0.05"
    assert len(shortened("x" * 50)) == 16 and shortened("short") == "short"
    assert plain("a\x00\ud800\nb") == "a\ufffd\ufffd\ufffdb"


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    to_svg(drawn("lines")[0])
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"fggm-peft\[continual\]"):
        plotting.new_figure(1.0)

"""Plots show their values, and draw text literally."""

from __future__ import annotations

import html
import re
import sys

import pytest

from fggm_peft import plots
from fggm_peft.plots import (
    INK,
    heat_map,
    legend,
    looks,
    new_figure,
    plain,
    save,
    shortened,
    style,
    to_svg,
)

HOSTILE = ["<script>x</script>", "$x^2$", "a_b", "&amp;", "\\frac", "%s {0}", "日本"]
LOOK = looks(["a"])["a"]
FALLING = [5.0] * 30 + [1.0] * 35


def drawn(kind, names=("a", "b", "c")):
    return DRAW[kind](list(names))


def lines_figure(names):
    figure, (axes,) = new_figure(2.5)
    with style():
        axes.plot([0, 1, 2], **LOOK)
        axes.set(title=names[0], xlabel=names[1], ylabel=names[2])
    return figure


DRAW = {
    "lines": lines_figure,
}


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("kind", DRAW)
def test_text_is_drawn_literally(kind):
    for first in range(0, len(HOSTILE) - 2, 2):
        names = HOSTILE[first : first + 3]
        svg = to_svg(drawn(kind, names), "<b>")
        escaped = [name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for name in names]
        for name in escaped:
            assert any(text == name or "…" in text for text in texts(svg)), (kind, name)
        assert "<script" not in svg and 'aria-label="&lt;b&gt;"' in svg


@pytest.mark.parametrize("kind", DRAW)
def test_the_same_plot_has_the_same_bytes(kind, tmp_path):
    assert to_svg(drawn(kind), "a") == to_svg(drawn(kind), "a")
    for suffix in ("svg", "pdf", "png"):
        for name in ("one", "two"):
            save(drawn(kind), tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


@pytest.mark.parametrize("kind", DRAW)
def test_an_svg_element_scales_and_has_the_text_color_of_the_page(kind):
    one, two = (to_svg(drawn(kind), alt) for alt in ("one", "two"))
    head = re.match(r"<svg [^>]*>", one)[0]
    assert "viewBox" in head and " width" not in head and " height" not in head
    assert "currentColor" in one and INK not in one
    assert not re.search(r"<style|<metadata|https?:|<image", one)
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (one, two)]
    assert set(re.findall(r'(?:href="#|url\(#)([\w-]+)', one)) <= ids[0] and not ids[0] & ids[1]


def test_a_heat_map_shows_its_values_and_leaves_missing_cells_empty():
    figure, (axes,) = new_figure(2.5)
    heat_map(axes, [[0.125, None], [1.0, -0.5]], ["r", "s"], ["c", "d"])
    assert [text for text in texts(to_svg(figure, "plot")) if text not in "rscd"] == [".12", "1.0", "-.50"]


def test_a_small_value_in_a_cell_is_not_shown_as_zero():
    figure, (axes,) = new_figure(2.5)
    heat_map(axes, [[0.004, 0.0], [-0.004, 0.0051], [1e-9, -0.0]], ["r", "s", "t"], ["c", "d"])
    found = [text for text in texts(to_svg(figure, "plot")) if text not in "rstcd"]
    assert [html.unescape(text) for text in found] == [".004", "0", "-.004", ".01", "1e-09", "0"]


def test_a_heat_map_of_many_columns_has_a_color_bar_instead():
    figure, (axes,) = new_figure(2.5)
    heat_map(axes, [[0.37] * 13, [0.51] * 13], ["r", "s"], [f"c{n}" for n in range(13)])
    assert len(figure.axes) == 2 and ".37" not in texts(to_svg(figure, "plot"))


@pytest.mark.parametrize("columns", [13, 20])
def test_a_wide_heat_map_may_have_values_that_fit_their_cells(columns):
    figure, (axes,) = new_figure(1.5, 0.27 * columns + 1)
    values, names = [[0.37] * columns, [-0.51] * columns], [f"c{n}" for n in range(columns)]
    heat_map(axes, values, ["r", "s"], names, has_values=True)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(figure.axes) == 1 and len(boxes) == 2 * columns
    assert max(box.width for box in boxes) < axes.get_window_extent().width / columns


def test_the_color_bar_has_a_label():
    figure, (axes,) = new_figure(2.5)
    heat_map(axes, [[0.37] * 3], ["r"], ["c", "d", "e"], 0.0, 1.0, scale="a <share>")
    assert {"a &lt;share&gt;", ".37"} <= set(texts(to_svg(figure, "plot")))


def test_a_legend_stays_within_the_figure():
    figure, (axes,) = new_figure(3.0)
    for n in range(7):
        axes.plot([0, 1], [0, 1], label=f"a_rather_long_name.{n}")
    legend(axes)
    figure.draw_without_rendering()
    box, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1


def test_series_differ_in_more_than_their_color():
    found = list(looks([str(n) for n in range(96)]).values())
    assert len({tuple(look.values()) for look in found}) == 96
    assert len({look["color"] for look in found[:8]}) == 8 and len({look["marker"] for look in found[:12]}) == 12


def test_long_names_keep_their_end_and_control_characters_are_replaced():
    assert shortened("fggm-element-density-0.05") == "fggm-eleme…-0.05"
    assert len(shortened("x" * 50)) == 16 and shortened("short") == "short"
    assert plain("a\x00\ud800\nb") == "a\ufffd\ufffd\ufffdb"


def test_drawing_does_not_change_the_settings_of_matplotlib():
    import matplotlib

    before = dict(matplotlib.rcParams)
    to_svg(drawn("lines"), "plot")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("package", ["matplotlib", "seaborn", "adjustText"])
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"plots need {package}: .*fggm-peft\[continual\]"):
        plots.new_figure(1.0)

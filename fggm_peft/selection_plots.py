"""Pictures of a selection: where it is, how its scores fall, whether it had data enough, what it shares with others.

Each is a function over plain results that gives a figure; ``report_pictures`` draws what a report has to show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .core.spectrum import SHARES
from .plots import (
    doubling,
    falling,
    heat_map,
    heat_map_height,
    legend,
    lines,
    looks,
    new_figure,
    save,
    shortened,
    titles,
)
from .selection.scoring import SUFFICIENT_AGREEMENT
from .tuner.module_paths import density_grid, place_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .selection.report import SelectionReport

FORMATS = ("svg", "png", "pdf")
_WIDE = 4.4  # inches: a column for each of many layers

Value = float | None
Curve = Sequence[tuple[int, Value]]
"""Samples and the agreement of their halves, check by check."""


def density_picture(shares: Mapping[str, tuple[float, int]], title: str = "") -> Figure:
    """What share of each weight may move: types of modules down, layers across; white where there is no module.

    Args:
        shares: module path -> share in [0, 1], entries of the weight; one at least.
    """
    grid = density_grid(shares)
    names = _thinned(grid.layers)
    high = max(value for row in grid.values for value in row if value is not None)
    figure, (axes,) = new_figure(0.75 + heat_map_height(len(grid.kinds), names), _WIDE)
    heat_map(axes, grid.values, grid.kinds, names, 0.0, high or 1.0, scale="share that may move")
    titles(axes, title, x="layer" if any(grid.layers) else "")
    return figure


def _thinned(names: Sequence[str], most: int = 8) -> list[str]:
    """The names with the emptied in between that there is no room for; the first of each stack stays."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(names) <= step * most)
    found, place, stack = [], 0, None
    for name in names:
        prefix, _, _ = name.rpartition(" ")
        place = place + 1 if prefix == stack else 0
        stack = prefix
        found.append(name if place % step == 0 else "")
    return found


def spectrum_picture(
    spectra: Mapping[str, Sequence[float]], densities: Mapping[str, float], unit: str, title: str = ""
) -> Figure:
    """How scores fall from the best unit to the worst, for each type of module; bold is what was chosen.

    A curve is the geometric mean over the modules of a type, since they are drawn on a log scale; with a threshold that
    looks at one module at a time it is bold up to where they were cut.

    Args:
        spectra: module path -> scores over their mean at ``core.spectrum.SHARES``; one not all zero at least.
        densities: module path -> share of its units that was chosen.
        unit: "row", "column" or "element".
    """
    import numpy as np

    found: dict[str, list[str]] = {}
    for name, values in spectra.items():
        if max(values) > 0:
            found.setdefault(place_of(name).kind, []).append(name)
    names = _short_kinds(found)
    series, bold = {}, {}
    for kind, members in found.items():
        curves = np.array([spectra[name] for name in members])
        known = np.all(curves > 0, axis=0)
        mean = np.exp(np.log(np.where(curves > 0, curves, 1)).mean(0))
        first = int((mean[1:] == mean[0]).sum())  # up to the share that one unit is, all are the best unit's
        points = [*zip(SHARES, mean.tolist(), known.tolist(), strict=True)][max(1, first) :]
        series[names[kind]] = [(share, value) for share, value, is_known in points if is_known]
        bold[names[kind]] = float(np.mean([densities[name] for name in members]))
    series = {name: points for name, points in series.items() if points}
    figure, (axes,) = new_figure(3.1 + 0.14 * len(series) / 2)
    falling(axes, series, bold)
    titles(axes, title, x=f"share of the {unit}s, best first", y="score / mean score")
    legend(axes, list(series))
    return figure


def _short_kinds(kinds: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Type -> the name that a density picture has for it; those beyond the eighth are told apart by their lines."""
    grid = density_grid({members[0]: (1.0, 1) for members in kinds.values()})
    return dict(zip(kinds, grid.kinds, strict=True))


def agreement_picture(curves: Mapping[str, Curve], title: str = "") -> Figure:
    """How alike two halves of the samples choose, by the number of samples, and where "auto" would stop.

    Args:
        curves: name -> checks; one with an agreement at least.
    """
    known = {
        name: [(n, value) for n, value in checks if value is not None]
        for name, checks in curves.items()
        if any(value is not None for _, value in checks)
    }
    places = sorted({samples for checks in known.values() for samples, _ in checks})
    series = {name: [dict(checks).get(place) for place in places] for name, checks in known.items()}
    figure, (axes,) = new_figure(2.7 if len(series) == 1 else 3.0)
    lines(axes, places, series, looks(list(series)))
    doubling(axes, places, {f"enough: {SUFFICIENT_AGREEMENT:g}": SUFFICIENT_AGREEMENT})
    low = min(value for checks in known.values() for _, value in checks)
    axes.set_ylim(min(low - 0.05, 0.5), 1.0)
    titles(axes, title, x="samples", y="agreement of two halves")
    if len(series) > 1:
        legend(axes, list(series))
    return figure


def overlap_picture(
    names: Sequence[str], jaccard: Sequence[Sequence[Value]], chance: Sequence[Sequence[Value]], title: str = ""
) -> Figure:
    """What supports share: below the diagonal their Jaccard index, above it what chance would give.

    Args:
        jaccard, chance: ``[n, n]``, as ``sharing.overlaps`` gives them.
    """
    size = range(len(names))
    both = [[jaccard[i][j] if j <= i else chance[i][j] for j in size] for i in size]
    figure, (axes,) = new_figure(0.2 + heat_map_height(len(names), names))
    heat_map(axes, both, names, names, 0.0, 1.0)
    titles(axes, title, x="below: Jaccard index; above: by chance")
    return figure


def checks_of(report: SelectionReport) -> dict[str, list[tuple[int, Value]]]:
    """What "auto" saw of the task and of each reference, with the agreement at the end where it is the same measure."""
    found: dict[str, list[tuple[int, Value]]] = {}
    for check in report.checks:
        found.setdefault(check.data, []).append((check.samples, check.agreement))
    task = found.get("task", [])
    if task and not report.reference_samples and report.samples > task[-1][0]:
        task.append((report.samples, report.agreement))  # the data ended between two checks
    return found


def report_pictures(report: SelectionReport) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each picture that the report has something for: density, spectrum, agreement."""
    yield "density", density_picture(report.shares())
    spectra = {module.name: module.spectrum for module in report.modules}
    if any(max(values, default=0) > 0 for values in spectra.values()):
        densities = {module.name: module.density for module in report.modules}
        yield "spectrum", spectrum_picture(spectra, densities, report.granularity)
    checks = checks_of(report)
    if any(agreement is not None for curve in checks.values() for _, agreement in curve):
        yield "agreement", agreement_picture(checks)


def write_pictures(pictures: Iterator[tuple[str, Figure]], folder: Path, format: str) -> list[Path]:
    """Save each picture under its name in ``folder``, which is made; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in pictures:
        files.append(folder / f"{name}.{format}")
        save(figure, files[-1])
    return files


def file_name(text: str) -> str:
    """A part of a file name: the text with a mark for what no file system likes, and not too long."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in shortened(text, 40)).strip(".") or "_"

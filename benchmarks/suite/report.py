"""The page of the suite's results: goals, a table for each measurement, and a chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fggm_peft.plots import heat_map, heat_map_height, new_figure, save, style

from .goals import Results, Verdict, verdicts
from .methods import FROZEN, METHODS

BEGIN, END = "<!-- written by benchmarks/suite -->", "<!-- end -->"
CHART_WIDTH = 9.5  # inches, for ten methods
FIGURES = {
    "ratio_min": ("time", "{:.2f}"),
    "peak_mib_ratio": ("memory", "{:.2f}"),
    "share_of_base": ("share of the model", "{:.3f}"),
    "bytes_per_value_ratio": ("file", "{:.2f}"),
    "over_bound": ("over bound", "{:.3f}"),
}
"""Figures that a cell shows -> their name and format."""


def goals_table(members: list[Verdict]) -> str:
    lines = ["| measurement | against | goal | result | |", "|---|---|---:|---:|---|"]
    for verdict in members:
        goal = verdict.goal
        mark = "not measured" if not verdict.ratios else "met" if verdict.met else "**missed**"
        lines.append(f"| {goal.what} | {goal.against} | ≤ {goal.limit:g}× | {_measured(verdict)} | {mark} |")
    return "\n".join(lines)


def _measured(verdict: Verdict) -> str:
    if not verdict.ratios:
        return "–"
    low, high = min(verdict.ratios.values()), max(verdict.ratios.values())
    return f"{high:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} – {high:.2f}"


def missed_text(members: list[Verdict]) -> str:
    """For each missed goal: the cases, the largest ratio, and the reason."""
    lines = []
    for verdict in members:
        goal, missed = verdict.goal, {key: r for key, r in verdict.ratios.items() if r > verdict.goal.limit}
        if missed:
            worst = max(missed, key=missed.__getitem__)
            where = f"missed in {len(missed)} of {len(verdict.ratios)} cases, at worst {missed[worst]:.2f}"
            place = worst.partition(": ")[2]
            text = f"- **{goal.what}**: {where}{f' ({place})' if place else ''}. {goal.reason}".rstrip()
            if worst in verdict.bounds:
                text += f" In this case, {goal.bound[0]} takes {verdict.bounds[worst]:.2f}."
            lines.append(text)
    return "\n".join(lines) if lines else "None."


def measurement_tables(results: Results, figures: Mapping[str, tuple[str, str]] = FIGURES) -> str:
    """One table for each measurement, with settings as rows and methods as columns. A cell has all figures."""
    parts = []
    for name in dict.fromkeys(key.partition(": ")[0] for key in results):
        tables = {key.partition(": ")[2]: t for key, t in results.items() if key.partition(": ")[0] == name}
        floor = next(iter(tables.values()))["floor"]
        shown = {f: figures[f] for f in figures if any(f in row for t in tables.values() for row in t["rows"].values())}
        legend = " / ".join(title for title, _ in shown.values())
        parts += [f"### {name.capitalize()}", "", f"{legend[0].upper()}{legend[1:]}, over {floor}.", ""]
        parts += [_table(tables, shown), ""]
    return "\n".join(parts).rstrip()


def _table(tables: dict[str, dict[str, Any]], figures: Mapping[str, tuple[str, str]]) -> str:
    methods = list(dict.fromkeys(method for table in tables.values() for method in table["rows"]))
    methods.sort(key=lambda method: list(METHODS).index(method) if method in METHODS else -1)
    lines = [f"| {' | '.join(['', *methods])} | noise |", f"|---|{'---:|' * (len(methods) + 1)}"]
    for setting, table in tables.items():
        rows = [table["rows"].get(method, {}) for method in methods]
        cells = [" / ".join(form.format(row[f]) for f, (_, form) in figures.items() if f in row) for row in rows]
        noise = f"{table['noise']:.2f}" if "ratio_min" in figures else ""
        lines.append(f"| {' | '.join([setting, *cells])} | {noise} |")
    return "\n".join(lines)


def machine_text(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    device = machine["cuda"] or machine["cpu"]
    return f"{machine['date']}, {device}, {machine['threads']} threads, {machine['clock']}; {versions}."


@style()
def draw(results: Results, path: Path) -> None:
    """Time and peak memory of a step over those of the frozen model, for all methods and settings."""
    steps = {k.partition(": ")[2]: t for k, t in results.items() if k.startswith("training step: ")}
    methods = [name for name in METHODS if name != FROZEN and any(name in table["rows"] for table in steps.values())]
    names = [_brief(table["setting"]) for table in steps.values()]
    height = 2 * heat_map_height(len(names), methods) + 0.4
    figure, axes = new_figure(height, CHART_WIDTH, rows=2)
    for place, (key, title) in zip(axes, (("ratio_min", "time"), ("peak_mib_ratio", "peak memory")), strict=True):
        grid = [[table["rows"].get(method, {}).get(key) for method in methods] for table in steps.values()]
        heat_map(place, grid, names, methods, low=1.0)
        place.set_title(f"{title} of a training step over a frozen forward and backward")
    save(figure, path)


def _brief(setting: dict[str, Any]) -> str:
    base = {"float32": "f32", "bfloat16": "bf16"}.get(setting["base"], setting["base"])
    length = "" if setting["length"] == 128 else f" T{setting['length']}"
    return f"{setting['parameters'] / 1e6:.0f}M {base} {100 * setting['density']:g}%{length}"


def page_text(contents: dict[str, Any], chart: str) -> str:
    """The text between the marks of the page."""
    members = verdicts(contents["results"])
    return "\n\n".join(
        [
            goals_table(members),
            "For several settings, the smallest and the largest ratio are shown. The largest ratio decides.",
            "### Missed goals",
            missed_text(members),
            "## All ratios",
            f"![Time and peak memory of a training step]({chart})",
            "Rows of the chart: parameters, base, density; 128 tokens per sample unless T says otherwise. "
            + machine_text(contents["machine"]),
            measurement_tables(contents["results"]),
        ]
    )


def write_page(contents: dict[str, Any], page: Path) -> None:
    """Write the results between the marks of the page, and the chart next to it."""
    chart = page.with_suffix(".png")
    if any(key.startswith("training step: ") for key in contents["results"]):
        draw(contents["results"], chart)
    head, begin, rest = page.read_text().partition(BEGIN)
    if not begin:
        raise ValueError(f"{page} has no mark {BEGIN}, which starts the results; add it")
    page.write_text(f"{head}{BEGIN}\n{page_text(contents, chart.name)}\n{END}{rest.partition(END)[2]}")

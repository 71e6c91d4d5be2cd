"""The page of the results of one device."""

from __future__ import annotations

from collections import Counter
from typing import Any

from suite.report import FIGURES, machine_text, measurement_tables

CPU_NOTE = """**These are CPU figures at tiny sizes. They show that every part runs, and say nothing about the speed or
the memory on a GPU.** No GPU figures exist yet."""
QUOTED = 12  # last lines of a traceback
SHOWN = {
    **FIGURES,
    "seconds": ("seconds", "{:.4g}"),
    "peak_mib": ("peak, MiB", "{:,.0f}"),
    "predicted_mib": ("predicted, MiB", "{:,.0f}"),
    "bytes": ("bytes", "{:,.0f}"),
}
"""Figures that the page shows -> their name and format."""
SCORES = ("op", "diagonal", "bwt", "general", "selection_seconds", "training_seconds", "evaluation_seconds")


def tables_of(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All tables of a part by their keys."""
    found = {k: t for figures in part["results"].values() for k, t in figures.items() if isinstance(t, dict)}
    return {key: table for key, table in found.items() if "rows" in table}


def summary(name: str, part: dict[str, Any]) -> str:
    """One line: how a part ended, and how many results and failures it has."""
    failures = len(part["failures"]) + sum(len(table.get("failed", {})) for table in tables_of(part).values())
    return f"{name}: {part.get('status', 'interrupted')}, {len(part['results'])} results, {failures} failures"


def text(contents: dict[str, Any]) -> str:
    """The page in Markdown."""
    machine = contents["machine"]
    lines = [f"# {machine['cuda'] or 'CPU (tiny shapes)'}", ""]
    lines += [] if machine["cuda"] else [CPU_NOTE, ""]
    lines += [f"{machine_text(machine)} `benchmarks/gpu/run.py` writes this page.", ""]
    lines += ["| part | status | seconds | results | failures |", "|---|---|---:|---:|---:|"]
    for name, part in contents["parts"].items():
        failures = summary(name, part).split()[-2]
        row = (name, part.get("status", "interrupted"), f"{part.get('seconds', 0):.0f}", len(part["results"]), failures)
        lines.append(f"| {' | '.join(map(str, row))} |")
    for name, part in contents["parts"].items():
        if name == "tests":
            outcomes = Counter(result["outcome"] for result in part["results"].values())
            outcomes["failed"] = len(part["failures"])
            lines += ["", "## tests", "", ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) + "."]
        elif name == "stream":
            lines += ["", "## stream", "", f"| method | {' | '.join(SCORES)} |", "|---|" + "---:|" * len(SCORES)]
            for key, figures in part["results"].items():
                lines.append(f"| {key} | {' | '.join(f'{figures[score]:.3f}' for score in SCORES)} |")
        elif tables := tables_of(part):
            lines += ["", f"## {name}", "", measurement_tables(tables, SHOWN)]
    return "\n".join([*lines, *failures_text(contents["parts"])]) + "\n"


def failures_text(parts: dict[str, dict[str, Any]]) -> list[str]:
    """The last lines of every traceback."""
    found = {}
    for name, part in parts.items():
        if part.get("error"):
            found[name] = part["error"]
        found |= {f"{name}: {key}": error for key, error in part["failures"].items()}
        for key, table in tables_of(part).items():
            found |= {f"{key}: {method}": error for method, error in table.get("failed", {}).items()}
    lines = ["", "## Failures", ""] if found else []
    for key, error in found.items():
        lines += [f"### {key}", "", "```", *error.strip().splitlines()[-QUOTED:], "```", ""]
    return lines

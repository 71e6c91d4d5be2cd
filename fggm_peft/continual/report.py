"""What came of a stream, as JSON and as a table in Markdown; every figure with the number of runs behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measures import MEASURES, summarise

COLUMNS = {
    "OP": "op",
    "mean OP": "op_mean",
    "learned": "diagonal",
    "BWT": "bwt",
    "forgetting": "forgetting",
    "FWT": "fwt",
    "general loss": "general",
}
"""Heading -> name of the measure in ``report.json``."""
FORMULAS = {
    "OP": "final_op",
    "mean OP": "mean_op",
    "learned": "diagonal_mean",
    "BWT": "backward_transfer",
    "forgetting": "forgetting",
    "FWT": "forward_transfer",
}


def report_of(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``{"runs": [...], "summary": [...]}``; one entry of the summary for each method and learning rate.

    A figure of the summary is ``{"mean", "std", "n", "interval", "confidence"}`` over seeds and orders (std and
    interval are null for one run), or null where it has no meaning.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["label"], result["learning_rate"]), []).append(result)
    summary = [
        {
            "label": label,
            "method": runs[0]["method"],
            "learning_rate": rate,
            "runs": len(runs),
            **{name: _summary([_figure(run, name) for run in runs]) for name in COLUMNS.values()},
            "cost": {
                name: _summary([run["cost"][name] for run in runs])
                for name in runs[0]["cost"]
                if not name.endswith("memory")
            },
        }
        for (label, rate), runs in groups.items()
    ]
    return {"runs": list(results), "summary": summary}


def _figure(run: dict[str, Any], name: str) -> float | None:
    value = run[name]
    return value["change"] if isinstance(value, dict) else value


def _summary(values: list[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    return summarise(known).to_dict() if known else None


def write_report(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """``report.json`` and ``report.md`` in ``folder``, whole or not at all."""
    report = report_of(results)
    for name, text in (("report.json", json.dumps(report, indent=1)), ("report.md", _markdown(report))):
        write_whole(folder / name, text)


def write_whole(file: Path, text: str) -> None:
    """Write a file, in folders that are made for it, so that it is never seen half-written."""
    partial = file.with_name(file.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text)
    partial.replace(file)


def shown(figure: dict[str, Any] | None) -> str:
    """A figure of the summary in a cell: mean, and standard deviation where there are several runs."""
    if figure is None:
        return ""
    deviation = "" if figure["std"] is None else f" ± {figure['std']:.3f}"
    return f"{figure['mean']:.3f}{deviation}"


def _markdown(report: dict[str, Any]) -> str:
    headings = ["method", "learning rate", "runs", *COLUMNS, "training s", "selection s"]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    for entry in report["summary"]:
        cells = [_escaped(entry["label"]), f"{entry['learning_rate']:g}", str(entry["runs"])]
        cells += [shown(entry[name]) for name in COLUMNS.values()]
        cells += [shown(entry["cost"][name]) for name in ("training_seconds", "selection_seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    formulas = [f"- **{heading}**: `{MEASURES[name].formula}`" for heading, name in FORMULAS.items()]
    formulas.append("- **general loss**: change of the mean next-token loss on general text, in nats; + is worse")
    legend = "R[t,j] is the score on task j after task t, r0[j] that of the base. Mean ± standard deviation over runs."
    return "\n".join(["# What was learned, and what it cost", "", *lines, "", legend, "", *formulas, ""])


def _escaped(text: str) -> str:
    """A label of the stream's author as plain text in a Markdown table."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|" else c for c in text)

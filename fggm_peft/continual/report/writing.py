"""Reads the results of runs from folders, and writes the files of a report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...tuner.files.atomic import write_whole
from ..fingerprint import differences
from .contents import report_of

PACKAGES = ("adjustText", "jinja2", "matplotlib", "scipy", "seaborn")


def require_report_packages() -> None:
    """Raise ``ImportError`` if a package that a report needs is missing; call it before the runs start."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ImportError(f"a report needs {' and '.join(missing)}: pip install 'fggm-peft[continual]'")


def read_results(folders: Sequence[Path | str]) -> list[dict[str, Any]]:
    """The results of all finished runs in output folders of ``fggm sequence``.

    If several folders contain the same label, the folder's name is added to it. A warning lists the differences
    between the folders' streams, because results of different streams cannot be compared.

    Raises:
        FileNotFoundError: a folder contains no finished run.
    """
    results = {Path(folder): _results_in(Path(folder)) for folder in folders}
    first, *others = results
    for other in others:
        streams = [json.loads((folder / "stream.json").read_text(encoding="utf-8")) for folder in (first, other)]
        if found := differences(*streams):
            warnings.warn(f"the streams of {first} and {other} differ: {'; '.join(found)}", stacklevel=2)
    labels = {folder: {run["label"] for run in runs} for folder, runs in results.items()}
    shared = {label for folder in results for label in labels[folder] if sum(label in s for s in labels.values()) > 1}
    return [
        {**run, "label": f"{run['label']} ({folder.name})"} if run["label"] in shared else run
        for folder, runs in results.items()
        for run in runs
    ]


def _results_in(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("runs/*/*/run.json"))
    if not files:
        raise FileNotFoundError(f"no finished run in {folder}; name an output folder of fggm sequence")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def write_report(folder: Path | str, results: Sequence[dict[str, Any]], page: bool = True) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html`` to ``folder``; equal results give equal bytes.

    Args:
        results: of ``run_stream`` or ``read_results``, finished or not.
        page: also write ``report.html``, which takes some seconds.
    """
    from .markdown import markdown_of

    folder, report = Path(folder), report_of(results)
    write_whole(folder / "report.json", json.dumps(report, indent=1, allow_nan=False))
    write_whole(folder / "report.md", markdown_of(report))
    if page:
        from .page import page_of

        write_whole(folder / "report.html", page_of(report))

"""Reads the results of runs from folders, and writes the files of a report."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...tuner.files import write_whole
from ..measures import MEASURES
from ..stream import differences
from .contents import report_of
from .tables import glance_of, tables_of


def require_report_packages() -> None:
    """Raise ``ImportError`` if a package that metrics or a report need is missing; call it before the runs start."""
    packages = ("adjustText", "jinja2", "matplotlib", "rapidfuzz", "scipy", "seaborn")
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ImportError(f"a sequence needs {' and '.join(missing)}: pip install 'fggm-peft[continual]'")


def read_results(folders: Sequence[Path | str]) -> list[dict[str, Any]]:
    """The results of all finished runs in output folders of ``fggm sequence``.

    If several folders contain the same label, the folder is added to it. A warning lists the differences between the
    folders' streams, because results of different streams cannot be compared.

    Raises:
        FileNotFoundError: a folder contains no finished run.
    """
    results = {Path(folder): list(map(_read, sorted(Path(folder).glob("runs/*/*/run.json")))) for folder in folders}
    first = next(iter(results))
    for folder, runs in results.items():
        if not runs:
            raise FileNotFoundError(f"no finished run in {folder}; name an output folder of fggm sequence")
        if changes := differences(_read(first / "stream.json"), _read(folder / "stream.json")):
            warnings.warn(f"the streams of {first} and {folder} differ: {'; '.join(changes)}", stacklevel=2)
    counts = Counter(label for runs in results.values() for label in {run["label"] for run in runs})
    return [
        {**run, "label": f"{run['label']} ({folder})"} if counts[run["label"]] > 1 else run
        for folder, runs in results.items()
        for run in runs
    ]


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write_report(folder: Path | str, results: Sequence[dict[str, Any]], page: bool = True) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html`` to ``folder``; equal results give equal bytes.

    Args:
        results: of ``run_stream`` or ``read_results``, finished or not.
        page: also write ``report.html``, which takes some seconds.
    """
    folder, report = Path(folder), report_of(results)
    write_whole(folder / "report.json", json.dumps(report, indent=1, allow_nan=False))
    write_whole(folder / "report.md", markdown_of(report))
    if page:
        write_whole(folder / "report.html", page_of(report))


def page_of(report: Mapping[str, Any]) -> str:
    """``report.html``, which needs no network and no script. Everything is escaped except the SVG of the figures."""
    from .figures import pictures_of

    return _rendered("report.html", report, pictures=pictures_of(report))


def markdown_of(report: Mapping[str, Any]) -> str:
    """``report.md``: the tables and formulas, for a terminal or a code host. Labels and task names are escaped."""
    return _rendered("report.md", report)


def _rendered(template: str, report: Mapping[str, Any], **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": Markup, "escaped": escaped}
    values |= {"report": report, "glance": glance_of(report), "tables": tables_of(report)}
    values["headings"] = {name: MEASURES[name].heading for name in MEASURES}
    return environment.get_template(template).render(values)


def escaped(text: str) -> str:
    """Text that Markdown shows literally, in a cell or a paragraph."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|&~$" else " " if c in "\r\n" else c for c in text)

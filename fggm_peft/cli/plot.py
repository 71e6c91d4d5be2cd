"""``fggm plot``: pictures of what saved adapters chose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..tuner.files.atomic import complete_folder
from .command import Result
from .output import require_adapter, require_free

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from ..deltas.saved_selection import SavedAdapter


def run(
    adapters: Annotated[list[str], typer.Argument(help="Folders or Hub ids of FGGM adapters.", metavar="ADAPTER...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")],
    format: Annotated[Literal["svg", "png", "pdf"], typer.Option(help="Of the pictures.")] = "svg",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures in the output folder.")] = False,
) -> Result:
    """Draw what each ADAPTER may move, layer by layer, and what several have in common.

    Where its files have them, also how its scores fall (saved scores of rows or columns) and how the halves of its
    samples agreed. No weights of the base are loaded.
    """
    require_free(output, overwrite)
    for name in adapters:
        require_adapter(name)

    from ..deltas.saved_selection import saved_adapter
    from ..plots import save_all

    found = [saved_adapter(name) for name in adapters]
    drawing = _Drawing(found)
    with complete_folder(output) as folder:
        files = save_all(drawing.pictures(), folder, format)
    data = {
        "output": str(output),
        "pictures": [file.name for file in files],
        "adapters": drawing.entries,
        "overlap": drawing.overlap,
    }
    return Result(data, _table(data))


class _Drawing:
    """Draws adapters of one base, and keeps what it says of each.

    Args:
        adapters: at least one.
    """

    def __init__(self, adapters: list[SavedAdapter]):
        self.adapters = adapters
        self.names = _names(adapters)
        self.entries: list[dict[str, Any]] = []
        self.overlap: dict[str, Any] | None = None

    def pictures(self) -> Iterator[tuple[str, Figure]]:
        """Name and figure of each picture."""
        from ..deltas.overlaps import support_overlap
        from ..plots import agreement_plot, overlap_plot
        from ..selection.scoring import SUFFICIENT_AGREEMENT

        for name, adapter in zip(self.names, self.adapters, strict=True):
            yield from self._of_one(name, adapter)
        curves = {
            name: adapter.checks
            for name, adapter in zip(self.names, self.adapters, strict=True)
            if any(agreement is not None for _, agreement in adapter.checks)
        }
        if curves:
            yield "agreement", agreement_plot(curves, SUFFICIENT_AGREEMENT)
        if len(self.adapters) > 1:
            found = support_overlap([adapter.folder for adapter in self.adapters])
            assert found is not None  # all are FGGM
            self.overlap = {"names": self.names, **found}
            yield "overlap", overlap_plot(self.names, found["jaccard"], found["chance"])

    def _of_one(self, name: str, adapter: SavedAdapter) -> Iterator[tuple[str, Figure]]:
        from ..plots import density_plot, spectrum_plot

        several = len(self.adapters) > 1
        suffix, title = (f"-{_file_name(name)}", name) if several else ("", "")
        shares = adapter.shares()
        why = adapter.why_no_spectrum()
        total = sum(entries for _, entries in shares.values())
        missing = {"spectrum": why} if why else {}
        if not adapter.checks:
            missing["agreement"] = 'it was not selected with num_samples="auto"'
        self.entries.append(
            {
                "adapter": adapter.name,
                "name": name,
                "density": sum(share * entries for share, entries in shares.values()) / total,
                "modules": {module: share for module, (share, _) in shares.items()},
                "left_out": missing,
            }
        )
        yield f"density{suffix}", density_plot(shares, title)
        if why is None:
            densities = {module: share for module, (share, _) in shares.items()}
            spectra = {module: values for module, values in adapter.spectra().items() if module in densities}
            yield f"spectrum{suffix}", spectrum_plot(spectra, densities, str(adapter.config.granularity), title)


def _names(adapters: list[SavedAdapter]) -> list[str]:
    """The last part of each path, with a number in front where that is not enough to tell them apart."""
    names = [adapter.folder.resolve().name if Path(adapter.name).is_dir() else adapter.name for adapter in adapters]
    return names if len(set(names)) == len(names) else [f"{n}-{name}" for n, name in enumerate(names, start=1)]


def _file_name(text: str) -> str:
    """A part of a file name, with a mark for each character that a file system may refuse."""
    from ..plots import shortened

    return "".join(c if c.isalnum() or c in "-_." else "_" for c in shortened(text, 40)).strip(".") or "_"


def _table(data: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"{len(data['pictures'])} pictures in {data['output']}: {', '.join(data['pictures'])}")
    table.add_column("adapter", overflow="fold")
    table.add_column("may move", justify="right")
    table.add_column("not drawn", overflow="fold")
    for entry in data["adapters"]:
        reasons = [f"{picture}: {why}" for picture, why in entry["left_out"].items()]
        table.add_row(entry["adapter"], f"{entry['density']:.2%}", "\n".join(reasons))
    return table

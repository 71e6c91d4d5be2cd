"""What came of a stream: as JSON, as Markdown, and as one HTML page with pictures; how two streams' runs compare."""

from .contents import COLUMNS, report_of
from .tables import shown
from .writing import require_report_packages, write_report

__all__ = ["COLUMNS", "report_of", "require_report_packages", "shown", "write_report"]

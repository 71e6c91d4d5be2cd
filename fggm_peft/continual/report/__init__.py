"""The report of a stream's runs: JSON, Markdown, and one HTML page with figures."""

from .contents import report_of
from .tables import shown
from .writing import read_results, require_report_packages, write_report

__all__ = ["read_results", "report_of", "require_report_packages", "shown", "write_report"]

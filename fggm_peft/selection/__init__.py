"""The Fisher pass: which weights does the new task's data ask for?"""

from .report import SelectionReport
from .select import select_parameters

__all__ = ["SelectionReport", "select_parameters"]

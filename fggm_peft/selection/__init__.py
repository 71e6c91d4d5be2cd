"""The Fisher pass: which weights does the new task's data ask for?"""

from ..cost import CostEstimate, estimate
from .online import online_selection
from .report import SelectionReport
from .select import select_parameters

__all__ = ["CostEstimate", "SelectionReport", "estimate", "online_selection", "select_parameters"]

"""The Fisher pass: which weights does the new task's data ask for?"""

from .frozen_model import same_random_state
from .report import SelectionReport
from .select import select_parameters

__all__ = ["SelectionReport", "same_random_state", "select_parameters"]

"""Selection of the weights that an adapter may change: a pass over data, then a threshold (see docs/score_path.md)."""

from .frozen_model import same_random_state
from .input_covariance import input_covariance, linear_layers
from .report import SelectionReport
from .select import remember_task, select_parameters

__all__ = [
    "SelectionReport",
    "input_covariance",
    "linear_layers",
    "remember_task",
    "same_random_state",
    "select_parameters",
]

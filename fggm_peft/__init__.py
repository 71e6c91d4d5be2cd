"""Fisher-Guided Gradient Masking (FGGM, arXiv 2601.18261) as a PEFT method.

Importing the package registers FGGM with PEFT, so that ``PeftModel.from_pretrained`` loads FGGM adapters.
"""

from typing import TYPE_CHECKING, Any

from . import training
from .core.criteria import CRITERIA, Criterion
from .core.errors import (
    AdapterFileError,
    AdapterNotSelectedError,
    AlreadyTrainedError,
    BaseMismatchError,
    LossyMergeError,
    NonFiniteScoreError,
    ScoreFileError,
)
from .core.threshold import (
    AbsoluteScore,
    MeanPlusStd,
    ParameterBudget,
    ScoreMass,
    ThresholdPolicy,
    TopDensity,
)
from .selection import CostEstimate, SelectionReport, estimate, select_parameters
from .tuner import FGGMConfig, FGGMLayer, FGGMModel, MergeReport
from .version import __version__

if TYPE_CHECKING:
    from .training import FGGMCallback, FGGMTrainer, FGGMTrainerMixin

__all__ = [
    "CRITERIA",
    "AbsoluteScore",
    "AdapterFileError",
    "AdapterNotSelectedError",
    "AlreadyTrainedError",
    "BaseMismatchError",
    "CostEstimate",
    "Criterion",
    "FGGMCallback",
    "FGGMConfig",
    "FGGMLayer",
    "FGGMModel",
    "FGGMTrainer",
    "FGGMTrainerMixin",
    "LossyMergeError",
    "MeanPlusStd",
    "MergeReport",
    "NonFiniteScoreError",
    "ParameterBudget",
    "ScoreFileError",
    "ScoreMass",
    "SelectionReport",
    "ThresholdPolicy",
    "TopDensity",
    "__version__",
    "estimate",
    "select_parameters",
]


def __getattr__(name: str) -> Any:
    if name in training.__all__:
        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

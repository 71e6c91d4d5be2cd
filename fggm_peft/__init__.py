"""Fisher-Guided Gradient Masking (FGGM, arXiv 2601.18261) as a PEFT method.

Importing the package registers FGGM with PEFT, so that ``PeftModel.from_pretrained`` loads FGGM adapters.
"""

from .core.errors import (
    AdapterFileError,
    AdapterNotSelectedError,
    AlreadyTrainedError,
    LossyMergeError,
    NonFiniteScoreError,
)
from .core.threshold import (
    AbsoluteScore,
    MeanPlusStd,
    ParameterBudget,
    ScoreMass,
    ThresholdPolicy,
    TopDensity,
)
from .selection import SelectionReport, select_parameters
from .tuner import FGGMConfig, FGGMLayer, FGGMModel, MergeReport
from .version import __version__

__all__ = [
    "AbsoluteScore",
    "AdapterFileError",
    "AdapterNotSelectedError",
    "AlreadyTrainedError",
    "FGGMConfig",
    "FGGMLayer",
    "FGGMModel",
    "LossyMergeError",
    "MeanPlusStd",
    "MergeReport",
    "NonFiniteScoreError",
    "ParameterBudget",
    "ScoreMass",
    "SelectionReport",
    "ThresholdPolicy",
    "TopDensity",
    "__version__",
    "select_parameters",
]

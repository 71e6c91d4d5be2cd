"""Fisher-Guided Gradient Masking (FGGM, arXiv 2601.18261) as a PEFT method.

Importing the package registers FGGM with PEFT, so that ``PeftModel.from_pretrained`` loads FGGM adapters.
"""

from typing import TYPE_CHECKING, Any

from . import _peft, deltas, training  # noqa: F401 (_peft must be the first)
from .core.blocks import ColumnBlocks, NofM, RowBlocks
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
from .core.granularity import GRANULARITIES, Columns, Elements, Granularity, Rows
from .core.heads import Heads
from .core.registry import Registry
from .core.statistics import STATISTICS, Statistic
from .core.threshold import (
    POLICIES,
    MeanPlusStd,
    ParameterBudget,
    ScoreMass,
    ThresholdPolicy,
    TopDensity,
)
from .cost import CostEstimate, estimate
from .retention import HarmDecay, attach_harm_decay
from .selection import SelectionReport, input_covariance, remember_task, select_parameters
from .tuner import (
    LAYER_TYPES,
    FGGMConfig,
    FGGMLayer,
    FGGMModel,
    InputCovariance,
    MergeReport,
)
from .version import __version__

if TYPE_CHECKING:
    from .deltas import Ledger, SparseDelta, compose, diff, export_lora, overlap, prune
    from .training import FGGMCallback, FGGMTrainer, FGGMTrainerMixin

__all__ = [
    "CRITERIA",
    "GRANULARITIES",
    "LAYER_TYPES",
    "POLICIES",
    "STATISTICS",
    "AdapterFileError",
    "AdapterNotSelectedError",
    "AlreadyTrainedError",
    "BaseMismatchError",
    "ColumnBlocks",
    "Columns",
    "CostEstimate",
    "Criterion",
    "Elements",
    "FGGMCallback",
    "FGGMConfig",
    "FGGMLayer",
    "FGGMModel",
    "FGGMTrainer",
    "FGGMTrainerMixin",
    "Granularity",
    "HarmDecay",
    "Heads",
    "InputCovariance",
    "Ledger",
    "LossyMergeError",
    "MeanPlusStd",
    "MergeReport",
    "NofM",
    "NonFiniteScoreError",
    "ParameterBudget",
    "Registry",
    "RowBlocks",
    "Rows",
    "ScoreFileError",
    "ScoreMass",
    "SelectionReport",
    "SparseDelta",
    "Statistic",
    "ThresholdPolicy",
    "TopDensity",
    "__version__",
    "attach_harm_decay",
    "compose",
    "diff",
    "estimate",
    "export_lora",
    "input_covariance",
    "overlap",
    "prune",
    "remember_task",
    "select_parameters",
]


def __getattr__(name: str) -> Any:
    if name == "METHODS":  # not in __all__: it requires the extra [continual]
        from .continual import methods

        return methods.METHODS
    for package in (training, deltas):
        if name in package.__all__:
            return getattr(package, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""FGGM as a PEFT method: config, model, layers and merging."""

from .config import FGGMConfig
from .hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from .layer import FGGMLayer
from .merge_report import MergeReport, ModuleMerge
from .model import FGGMModel
from .registration import register

register(FGGMConfig, FGGMModel)

__all__ = [
    "FGGMConfig",
    "FGGMLayer",
    "FGGMModel",
    "MergeReport",
    "ModuleMerge",
    "hotswap_adapter",
    "prepare_model_for_compiled_hotswap",
]

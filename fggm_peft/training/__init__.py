"""Selection inside the trainers of transformers and TRL; the base model, data and evaluation of a training run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base_model import DTYPES, QUANTIZATIONS, BaseModel, BaseModelError, computes_bfloat16, this_process
    from .checkpoints import last_complete_checkpoint
    from .data import (
        FILE_TYPES,
        DataError,
        DataSource,
        Example,
        Records,
        RowFormat,
        TokenizedExamples,
        load_examples,
        load_rows,
        read_example,
        row_format,
    )
    from .evaluation import AnswerScores, exact_match, score_answers, written_answers
    from .texts import PARAGRAPH_LENGTH, read_paragraphs, text_batches
    from .trainer import FGGMCallback, FGGMTrainer, FGGMTrainerMixin

__all__ = ["DTYPES", "FILE_TYPES", "PARAGRAPH_LENGTH", "QUANTIZATIONS"]
__all__ += ["AnswerScores", "BaseModel", "BaseModelError", "DataError", "DataSource", "Example"]
__all__ += ["FGGMCallback", "FGGMTrainer", "FGGMTrainerMixin", "Records", "RowFormat", "TokenizedExamples"]
__all__ += ["computes_bfloat16", "exact_match", "last_complete_checkpoint", "load_examples", "load_rows"]
__all__ += ["read_example", "read_paragraphs", "row_format", "score_answers", "text_batches", "this_process"]
__all__ += ["written_answers"]


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes seconds to import, which loading an adapter does not need
    if name in __all__:
        for path in (".data", ".base_model", ".texts", ".evaluation", ".checkpoints", ".trainer"):
            if hasattr(module := import_module(path, __name__), name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Selection inside transformers' and TRL's trainers, and what the command line needs to train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import FGGMCallback, FGGMTrainer, FGGMTrainerMixin

__all__ = ["FGGMCallback", "FGGMTrainer", "FGGMTrainerMixin"]


def __getattr__(name: str) -> Any:
    # transformers' trainer takes seconds to import, which nobody who only loads an adapter should wait for
    if name in __all__:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

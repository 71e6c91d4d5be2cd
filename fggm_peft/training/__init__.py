"""Selection inside the trainers of transformers and TRL; the base model, data and evaluation of a training run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .texts import text_batches
    from .trainer import FGGMCallback, FGGMTrainer, FGGMTrainerMixin

__all__ = ["FGGMCallback", "FGGMTrainer", "FGGMTrainerMixin", "text_batches"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # transformers' Trainer takes seconds to import, which loading an adapter does not need
    from . import texts, trainer

    return getattr(texts if name == "text_batches" else trainer, name)

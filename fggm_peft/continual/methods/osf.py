"""OSF: training in the directions that a weight hardly uses."""

from __future__ import annotations

from dataclasses import dataclass

from peft import OSFConfig

from .method import METHODS
from .peft_method import PeftMethod


@METHODS.register("osf")
@dataclass
class OSF(PeftMethod):
    """Orthogonal subspace fine-tuning (arXiv 2504.07097), as implemented in PEFT.

    The largest singular directions of each weight are kept; the others train, with gradients orthogonal to them.
    Between tasks it follows PEFT's documentation ("Sequential Task Learning"): the task is merged, the singular value
    decomposition of the weights is computed again, and a larger part of it is kept. (The page calls ``unload()``,
    which loses the task in peft 0.21, because the delta is not in the weight until it is merged.) PEFT's OSF adapts
    ``nn.Linear`` and skips GPT-2's Conv1D.

    Args:
        effective_rank: the share of a weight's rank that is kept in the first task, in (0, 1).
        growth: increase of this share with every task, up to ``most``.
        most: the largest share.
    """

    config_class = OSFConfig
    effective_rank: float = 0.5
    growth: float = 0.05
    most: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.effective_rank <= self.most < 1 or self.growth < 0:
            raise ValueError(
                "OSF needs 0 < effective_rank <= most < 1 and growth >= 0, got "
                f"effective_rank={self.effective_rank!r}, growth={self.growth!r}, most={self.most!r}"
            )
        super().__post_init__()

    def defaults(self):
        share = min(self.effective_rank + self.growth * self.number, self.most)
        return {**super().defaults(), "effective_rank": share}

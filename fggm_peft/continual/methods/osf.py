"""Training in the directions that a weight hardly uses."""

from __future__ import annotations

from dataclasses import dataclass

from peft import OSFConfig

from .method import METHODS
from .peft_method import PeftMethod


@METHODS.register("osf")
@dataclass
class OSF(PeftMethod):
    """Orthogonal subspace fine-tuning (arXiv 2504.07097), as PEFT has it.

    The largest singular directions of each weight are kept; the others train, with gradients orthogonal to those kept.
    Between tasks it does what PEFT's documentation says ("Sequential Task Learning"): the task becomes part of the
    weights, their singular value decomposition is computed again, and a larger part of it is kept. (The page
    unloads with ``unload()``, which in peft 0.21 drops what was learned: the delta is not in the weight until merged.)
    For ``nn.Linear``; PEFT's OSF passes by GPT-2's Conv1D.

    Args:
        effective_rank: the share of a weight's rank that is kept in the first task, in (0, 1).
        growth: how much is added to it with every task; it stops at ``most``.
        most: the largest share that is kept.
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

    def defaults(self, number):
        kept = min(self.effective_rank + self.growth * number, self.most)
        return {**super().defaults(number), "effective_rank": kept}

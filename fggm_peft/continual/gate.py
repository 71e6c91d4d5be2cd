"""Gates: limits on the loss of score that a new task may cause on earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from .settings import Settings

EVERY_TASK = "*"


class Gate(Settings):
    """The share of an earlier task's score that must remain, and what happens if it does not.

    Args:
        keep: task -> share of its score right after it was learned, in (0, 1]; "*" stands for all other tasks.
        action: "stop" ends the run after the task that broke the gate. "rollback" restores the weights from before
            that task, bit for bit, and continues with the next task.
    """

    keep: dict[str, Annotated[float, Field(gt=0, le=1, strict=True)]] = Field(min_length=1)
    action: Literal["stop", "rollback"] = "stop"

    def violations(self, learned: Mapping[str, float], scores: Mapping[str, float]) -> list[dict[str, Any]]:
        """The earlier tasks whose score fell too low: ``[{"earlier", "score", "needed"}]``; ``learned`` is R[j,j]."""
        shares = {task: self.keep.get(task, self.keep.get(EVERY_TASK)) for task in learned}
        return [
            {"earlier": task, "score": scores[task], "needed": share * learned[task]}
            for task, share in shares.items()
            if share is not None and scores[task] < share * learned[task]
        ]

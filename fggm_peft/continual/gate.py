"""Gates: limits on the loss of score that a new task may cause on earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from .settings import Settings, StreamError

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
        """The earlier tasks whose score fell too low: ``[{"earlier", "score", "needed"}]``.

        Args:
            learned: earlier task -> its score right after it was learned, ``R[j,j]``.
            scores: task -> its score now.
        """
        violations = []
        for task, before in learned.items():
            share = self.keep.get(task, self.keep.get(EVERY_TASK))
            if share is not None and scores[task] < share * before:
                violations.append({"earlier": task, "score": scores[task], "needed": share * before})
        return violations


def read_gate(texts: Sequence[str], action: str) -> dict[str, Any]:
    """The fields of a gate from the command line: ``["intent=0.9", "*=0.8"]`` and an action.

    Raises:
        StreamError: a text is not a task and a share.
    """
    keep: dict[str, float] = {}
    for text in texts:
        task, _, share = text.rpartition("=")
        try:
            keep[task] = float(share)
        except ValueError:
            task = ""
        if not task:
            raise StreamError(f"--gate {text!r} is not a task and a share of its score, such as intent=0.9")
    return {"keep": keep, "action": action}

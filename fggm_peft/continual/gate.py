"""Gates: what happens when learning a task costs an earlier one too much of its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .settings import StreamError, listed

ACTIONS = ("stop", "rollback")
EVERY_TASK = "*"


@dataclass(frozen=True)
class Gate:
    """How much of an earlier task's score has to stay, and what is done where it does not.

    Args:
        keep: task -> share of its score right after it was learned, in (0, 1]; "*" stands for every other task.
        action: "stop" ends the run after the task that broke the gate; "rollback" restores the weights from before
            that task, bit for bit, and continues with the next task.

    Raises:
        StreamError: a share or an action is illegal.
    """

    keep: Mapping[str, float]
    action: str = "stop"

    def __post_init__(self) -> None:
        if not self.keep:
            raise StreamError("keep is empty; name a task and a share, such as {intent: 0.9}")
        for task, share in self.keep.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
                raise StreamError(f"keep has {task}: {share!r}; a share is a number in (0, 1]")
        if self.action not in ACTIONS:
            raise StreamError(f"unknown action {self.action!r}; {listed(self.action, list(ACTIONS))}")

    def require_tasks(self, tasks: Sequence[str]) -> None:
        """Raise ``StreamError`` if the gate names a task that is not there."""
        for name in self.keep:
            if name != EVERY_TASK and name not in tasks:
                raise StreamError(f"gate: unknown task {name!r}; {listed(name, [*tasks, EVERY_TASK])}")

    def violations(self, learned: Mapping[str, float], scores: Mapping[str, float]) -> list[dict[str, Any]]:
        """The earlier tasks that fell too low: ``[{"earlier", "score", "needed"}]``.

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
    """The gate of a command line: ``["intent=0.9", "*=0.8"]`` and an action.

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

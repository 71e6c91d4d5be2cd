"""General ability: the loss on a text and scores of lm-evaluation-harness, compared with the base model's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator
from torch import nn

from ..selection import same_random_state
from ..training import PARAGRAPH_LENGTH, DataError, TokenizedExamples, read_paragraphs, score_answers
from ..tuner.files import digest_of_folder
from ..tuner.hosts import four_bit_layers_as_they_are
from .lm_eval_tasks import require_data, require_tasks, task_scores
from .settings import Count, DataPath, Settings, StreamError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class General(Settings):
    """Measures of general ability, in addition to the tasks.

    Args:
        text: file of plain text in paragraphs, whose loss is compared with the base model's after every task.
        lm_eval: tasks or groups of lm-evaluation-harness, evaluated before the first and after the last task.
        lm_eval_limit: number of examples of each task, the first ones.
    """

    text: DataPath | None = None
    lm_eval: tuple[str, ...] = ()
    lm_eval_limit: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> General:
        if self.text is None and not self.lm_eval:
            raise ValueError("give text (a file), lm_eval (a list of tasks) or both")
        if len(set(self.lm_eval)) < len(self.lm_eval):
            raise ValueError(f"lm_eval contains a task more than once: {', '.join(self.lm_eval)}")
        if self.lm_eval_limit is not None and not self.lm_eval:
            raise ValueError("lm_eval_limit has no effect, because lm_eval is empty")
        if self.text is not None and not Path(self.text).is_file():
            raise ValueError(f"text: no file {self.text}")
        if self.lm_eval:
            require_tasks(self.lm_eval)
        return self

    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the scores, as JSON types; the text by its content."""
        return self.model_dump() | {"text": None if self.text is None else digest_of_folder(Path(self.text))}


class GeneralAbility:
    """Measures general ability and leaves model, tokenizer and random state unchanged.

    Args:
        general: what to measure; None for nothing.
        batch_size: of the text's paragraphs, and of lm_eval's requests.

    Raises:
        StreamError: the text is empty, or the data of a task cannot be loaded.
    """

    def __init__(self, general: General | None, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8):
        self.general, self.batch_size = general, batch_size
        self.examples: TokenizedExamples | None = None
        if general is not None and general.text is not None:
            try:
                paragraphs = read_paragraphs(general.text)
            except DataError as error:
                raise StreamError(f"general.text: {error}") from error
            self.examples = TokenizedExamples(paragraphs, tokenizer, PARAGRAPH_LENGTH)
        if general is not None and general.lm_eval:
            require_data(general.lm_eval)
            self.tokenizer = copy.deepcopy(tokenizer)  # lm_eval sets the padding side

    def measure(self, model: nn.Module, between_tasks: bool = False) -> dict[str, Any]:
        """``{"loss": float, "tasks": {name: {"value", "metric"}}}``.

        The loss is the mean over the text's tokens, in nats; None without a text. ``lm_eval_tasks.MAIN_METRICS``
        decides which of a task's metrics is its score.

        Args:
            between_tasks: measure only the loss of the text.
        """
        result: dict[str, Any] = {"loss": None, "tasks": {}}
        general = self.general
        with same_random_state(), _same_modes(model), four_bit_layers_as_they_are(model):
            if self.examples is not None:
                result["loss"] = score_answers(model, self.examples, self.batch_size, "General text").loss
            if general is not None and general.lm_eval and not between_tasks:
                options = general.lm_eval, self.batch_size, general.lm_eval_limit
                result["tasks"] = task_scores(model, self.tokenizer, *options)
        return result


@contextmanager
def _same_modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def general_change(measured: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The change of general ability from the base model.

    Args:
        measured: results of ``measure``, from the base model to the final model.

    Returns:
        ``{"change", "losses", "tasks"}`` or None if nothing was measured. ``change`` is that of the loss in nats, where
        + is worse; None without a text. Each of ``tasks`` has ``metric``, ``base``, ``final`` and ``change``.
    """
    first, last = measured[0], measured[-1]
    if not first["tasks"] and first["loss"] is None:
        return None
    tasks = {}
    for name, before in first["tasks"].items():
        base, final = before["value"], last["tasks"].get(name, before)["value"]
        tasks[name] = {"metric": before["metric"], "base": base, "final": final, "change": final - base}
    change = None if first["loss"] is None else last["loss"] - first["loss"]
    return {"change": change, "losses": [entry["loss"] for entry in measured], "tasks": tasks}

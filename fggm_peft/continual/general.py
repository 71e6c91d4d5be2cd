"""General ability: the loss on a text and scores of lm-evaluation-harness, compared with the base model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator
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
        text: file of plain text in paragraphs, whose loss is compared with the base model's.
        lm_eval: tasks, groups or tags of lm-evaluation-harness.
        lm_eval_include: folder with YAML files of your own tasks. Python functions that they name are run.
        lm_eval_limit: number of examples of each task, the first ones.
        lm_eval_shots: examples in the prompt; by default the task's own number.
        lm_eval_every_task: evaluate these tasks after every task, not only before the first and after the last one.
    """

    text: DataPath | None = None
    lm_eval: tuple[str, ...] = ()
    lm_eval_include: DataPath | None = None
    lm_eval_limit: Count | None = None
    lm_eval_shots: Annotated[int, Field(ge=0, strict=True)] | None = None
    lm_eval_every_task: bool = False

    @model_validator(mode="after")
    def _check(self) -> General:
        if self.text is None and not self.lm_eval:
            raise ValueError("give text (a file), lm_eval (a list of tasks) or both")
        if len(set(self.lm_eval)) < len(self.lm_eval):
            raise ValueError(f"lm_eval contains a task more than once: {', '.join(self.lm_eval)}")
        options = ("lm_eval_include", "lm_eval_limit", "lm_eval_shots", "lm_eval_every_task")
        if not self.lm_eval and (unused := [name for name in options if getattr(self, name) not in (None, False)]):
            raise ValueError(f"{unused[0]} has no effect, because lm_eval is empty")
        if self.text is not None and not Path(self.text).is_file():
            raise ValueError(f"text: no file {self.text}")
        if self.lm_eval_include is not None and not Path(self.lm_eval_include).is_dir():
            raise ValueError(f"lm_eval_include: no folder {self.lm_eval_include}")
        if self.lm_eval:
            require_tasks(self.lm_eval, self.lm_eval_include)
        return self

    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the scores, as JSON types; files by their content."""
        fields = self.model_dump(include=None if self.lm_eval else {"text"})
        for name in ("text", "lm_eval_include"):
            if fields.get(name) is not None:
                fields[name] = digest_of_folder(Path(fields[name]))
        return fields


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
            require_data(general.lm_eval, general.lm_eval_include)
            self.tokenizer = copy.deepcopy(tokenizer)  # lm_eval sets the padding side

    def measure(self, model: nn.Module, between_tasks: bool = False) -> dict[str, Any]:
        """``{"loss", "tasks": {name: score}, "metrics": {name: {"metric", "higher_is_better"}}}``.

        The loss is the mean over the text's tokens, in nats; None without a text. ``lm_eval_tasks.MAIN_METRICS``
        decides which of a task's metrics is its score.

        Args:
            between_tasks: neither before the first nor after the last task: without ``lm_eval_every_task``, only the
                text is evaluated.
        """
        result: dict[str, Any] = {"loss": None, "tasks": {}, "metrics": {}}
        general = self.general
        with same_random_state(), _same_modes(model), four_bit_layers_as_they_are(model):
            if self.examples is not None:
                result["loss"] = score_answers(model, self.examples, self.batch_size, "General text").loss
            if general is not None and general.lm_eval and (general.lm_eval_every_task or not between_tasks):
                options = {"limit": general.lm_eval_limit, "num_fewshot": general.lm_eval_shots}
                include, batch_size = general.lm_eval_include, self.batch_size
                scores = task_scores(model, self.tokenizer, general.lm_eval, include, batch_size, **options)
                for name, score in scores.items():
                    result["tasks"][name] = score.pop("value")
                    result["metrics"][name] = score
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
        ``{"base", "change", "worst", "losses", "tasks"}`` or None if nothing was measured. ``change`` is at the end
        and ``worst`` at the worst point, both as differences from the base model: of the loss in nats, where + is
        worse, and of each of ``tasks`` in its metric's unit, with ``metric``, ``higher_is_better`` and ``final``. The
        three values of the text are None without a text.
    """
    losses = [entry["loss"] for entry in measured]
    first = measured[0]
    if not first["tasks"] and losses[0] is None:
        return None
    tasks = {}
    for name, metric in first["metrics"].items():
        scores = [entry["tasks"][name] for entry in measured if name in entry["tasks"]]
        change = _change(scores, min if metric["higher_is_better"] else max)
        tasks[name] = {**metric, **change, "final": scores[-1]}
    text = dict.fromkeys(("base", "change", "worst")) if losses[0] is None else _change(losses, max)
    return {**text, "losses": losses, "tasks": tasks}


def _change(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> dict[str, float]:
    return {"base": values[0], "change": values[-1] - values[0], "worst": worst(values) - values[0]}

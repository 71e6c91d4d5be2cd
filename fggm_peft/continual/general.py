"""General ability: what a model could do before the tasks, by its loss on a text and by lm-evaluation-harness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..selection.frozen_model import same_random_state
from ..training.data import DataError, TokenizedExamples
from ..training.evaluation import score_answers
from ..training.texts import PARAGRAPH_LENGTH, read_paragraphs
from ..tuner.files.atomic import digest_of_folder
from ..tuner.hosts.bitsandbytes import four_bit_layers_as_they_are
from .lm_eval_tasks import TaskScore, require_data, require_tasks, task_scores
from .settings import StreamError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class General:
    """What is watched besides the tasks, as a sign of general ability.

    Args:
        text: file of plain text in paragraphs, whose loss is compared with the original model's.
        lm_eval: tasks, groups or tags of lm-evaluation-harness.
        lm_eval_include: folder with YAML files of tasks of one's own. What Python functions they name is run.
        lm_eval_limit: this many examples of each task, the first ones.
        lm_eval_shots: examples in the prompt; by default what the task says.
        lm_eval_every_task: ask these after every task, and not only before the first and after the last.

    Raises:
        StreamError: nothing is watched, or a field is out of range or has no use.
    """

    text: str | None = None
    lm_eval: tuple[str, ...] = ()
    lm_eval_include: str | None = None
    lm_eval_limit: int | None = None
    lm_eval_shots: int | None = None
    lm_eval_every_task: bool = False

    def __post_init__(self) -> None:
        if self.text is None and not self.lm_eval:
            raise StreamError("give text (a file), lm_eval (a list of tasks) or both")
        if twice := [name for name in self.lm_eval if self.lm_eval.count(name) > 1]:
            raise StreamError(f"lm_eval has {twice[0]!r} more than once")
        for name, least in (("lm_eval_limit", 1), ("lm_eval_shots", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise StreamError(f"{name} must be at least {least}, got {getattr(self, name)}")
        options = ("lm_eval_include", "lm_eval_limit", "lm_eval_shots", "lm_eval_every_task")
        if not self.lm_eval and (idle := [name for name in options if getattr(self, name) not in (None, False)]):
            raise StreamError(f"{idle[0]} is given, but no tasks: lm_eval is empty")

    def check(self) -> None:
        """Raises StreamError if a file or folder is missing, lm_eval is not installed, or does not know a task."""
        if self.text is not None and not Path(self.text).is_file():
            raise StreamError(f"text: no file {self.text}")
        if self.lm_eval_include is not None and not Path(self.lm_eval_include).is_dir():
            raise StreamError(f"lm_eval_include: no folder {self.lm_eval_include}")
        if self.lm_eval:
            require_tasks(self.lm_eval, self.lm_eval_include)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the figures, as plain types; files by their content."""
        found = {name: value for name, value in asdict(self).items() if name == "text" or self.lm_eval}
        for name in ("text", "lm_eval_include"):
            if found.get(name) is not None:
                found[name] = digest_of_folder(Path(found[name]))
        return found


class GeneralAbility:
    """Measures whatever is watched on a model, and leaves no trace of it.

    Args:
        general: what is watched; None for nothing.
        batch_size: of the text's paragraphs, and of lm_eval's requests.

    Raises:
        StreamError: the text is empty, or the tasks' data cannot be loaded.
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
            self.tokenizer = copy.deepcopy(tokenizer)  # lm_eval sets where it pads

    def measure(self, model: nn.Module, between_tasks: bool = False) -> dict[str, Any]:
        """``{"loss", "tasks": {name: score}, "metrics": {name: {"metric", "higher_is_better"}}}``.

        The loss is the mean over the text's tokens, in nats; None without a text. Which of a task's metrics is its
        score is in ``lm_eval_tasks.MAIN_METRICS``.

        Args:
            between_tasks: neither the first nor the last time: the tasks are left out, unless ``lm_eval_every_task``.
        """
        found: dict[str, Any] = {"loss": None, "tasks": {}, "metrics": {}}
        with same_random_state(), _same_modes(model), four_bit_layers_as_they_are(model):
            if self.examples is not None:
                found["loss"] = score_answers(model, self.examples, self.batch_size, "General text").loss
            if self.general is not None and (self.general.lm_eval_every_task or not between_tasks):
                for name, score in self._task_scores(model, self.general).items():
                    found["tasks"][name] = score.value
                    found["metrics"][name] = {"metric": score.metric, "higher_is_better": score.higher_is_better}
        return found

    def _task_scores(self, model: nn.Module, general: General) -> dict[str, TaskScore]:
        if not general.lm_eval:
            return {}
        return task_scores(
            model,
            self.tokenizer,
            general.lm_eval,
            include=general.lm_eval_include,
            limit=general.lm_eval_limit,
            shots=general.lm_eval_shots,
            batch_size=self.batch_size,
        )


@contextmanager
def _same_modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def general_change(measured: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How general ability changed from the base's.

    Args:
        measured: what ``measure`` gave, the base's first and the last model's last.

    Returns:
        ``{"base", "change", "worst", "losses", "tasks"}`` or None if nothing is watched. ``change`` is at the end and
        ``worst`` at the worst point, both as differences from the base: of the loss in nats, where + is worse, and for
        each of ``tasks``, which has ``metric``, ``higher_is_better`` and ``final`` besides, in the metric's unit.
        The text's three are None without a text.
    """
    losses = [entry["loss"] for entry in measured]
    names = list(measured[0]["tasks"])
    if not names and losses[0] is None:
        return None
    text = dict.fromkeys(("base", "change", "worst")) if losses[0] is None else _change(losses, max)
    return {**text, "losses": losses, "tasks": {name: _task_change(measured, name) for name in names}}


def _task_change(measured: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    what = measured[0]["metrics"][name]
    scores = [entry["tasks"][name] for entry in measured if name in entry["tasks"]]
    return {**what, **_change(scores, min if what["higher_is_better"] else max), "final": scores[-1]}


def _change(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> dict[str, float]:
    return {"base": values[0], "change": values[-1] - values[0], "worst": worst(values) - values[0]}

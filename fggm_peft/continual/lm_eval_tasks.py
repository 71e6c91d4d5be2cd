"""Tasks of EleutherAI's lm-evaluation-harness (the package lm_eval): found by name, run on a model, one score each."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .settings import StreamError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from torch import nn
    from transformers import PreTrainedTokenizerBase

MAIN_METRICS = ("acc_norm", "acc", "exact_match", "em", "f1", "word_perplexity", "perplexity", "bleu", "rougeL")
"""Of the metrics that a task has, the first of these is its score; if it has none of them, the first it has."""


@dataclass(frozen=True)
class TaskScore:
    """How a model did at a task.

    Args:
        value: mean over the task's examples, or whatever the task aggregates by.
        metric: its name in lm_eval, such as "acc_norm"; with the filter, such as "exact_match,strict-match", unless
            that is none.
        higher_is_better: False for a perplexity.
    """

    value: float
    metric: str
    higher_is_better: bool


def require_tasks(names: Sequence[str], include: str | None) -> None:
    """Raise StreamError if lm_eval is not installed, or has no task, group or tag of one of these names.

    Args:
        include: a folder with task files of one's own.
    """
    try:
        known = _task_manager(include).all_tasks
    except ImportError as error:
        raise StreamError(f"lm_eval needs the package lm_eval: pip install fggm-peft[general] ({error})") from error
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            where = "lm_eval" if include is None else f"lm_eval, nor in a readable YAML file in {include}"
            raise StreamError(f"lm_eval: no task {name!r} in {where}{hint}")


@lru_cache
def require_data(names: tuple[str, ...], include: str | None) -> None:
    """Load the tasks' data, which downloads what is not in the cache, so that it is there when it is needed.

    Raises:
        StreamError: it cannot be loaded, a task is named twice (itself, and by a group), or one would run code that
            the model writes.
    """
    try:
        with _quiet():
            tasks = _task_manager(include).load(list(names))["tasks"]
    except Exception as error:  # of lm_eval, of datasets, or of a task's own functions
        reason = " ".join(str(error).split())
        raise StreamError(f"general.lm_eval: cannot load {', '.join(names)}: {reason}") from error
    if unsafe := [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
        raise StreamError(f"general.lm_eval: {unsafe[0]} runs code that the model writes; leave it out")


def task_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    include: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
) -> dict[str, TaskScore]:
    """The score of each task; a tag, or a group that has no score of its own, gives those of its members.

    Training modes and the random state of torch, numpy and Python change; the caller keeps them.

    Args:
        limit: examples of each task, the first ones.
        shots: examples in the prompt, drawn by a fixed seed; None: as many as the task says.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager = _task_manager(include)
    with _quiet():
        results: Any = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),  # type: ignore[arg-type]
            tasks=list(names),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    members = _members(manager, results)
    return {leaf: _score(results, leaf) for name in names for leaf in _scored(name, results, members)}


@lru_cache
def _task_manager(include: str | None) -> TaskManager:
    """The index of all tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=include)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm_eval's warnings, which are about its own command line."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _members(manager: TaskManager, results: Mapping[str, Any]) -> dict[str, list[str]]:
    tags = {name: sorted(manager.task_index[name].tags) for name in manager.all_tags}
    return {**tags, **results["group_subtasks"]}


def _scored(name: str, results: Mapping[str, Any], members: Mapping[str, Sequence[str]]) -> list[str]:
    """The name itself if it has a score, else the names below it that have."""
    if _metrics(results["results"].get(name, {})):
        return [name]
    return [leaf for member in members.get(name, ()) for leaf in _scored(member, results, members)]


def _score(results: Mapping[str, Any], name: str) -> TaskScore:
    metrics = _metrics(results["results"][name])
    ranks = {metric: rank for rank, metric in enumerate(MAIN_METRICS)}
    key = min(metrics, key=lambda key: ranks.get(key.split(",")[0], len(ranks)))  # the first of equals
    metric = key.removesuffix(",none")
    direction = results["higher_is_better"].get(name, {}).get(metric.split(",")[0])
    return TaskScore(float(metrics[key]), metric, direction is not False)


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a task, by "metric,filter"; without their standard errors."""
    return {
        key: value
        for key, value in row.items()
        if "," in key and not key.split(",")[0].endswith("_stderr") and isinstance(value, (int, float))
    }

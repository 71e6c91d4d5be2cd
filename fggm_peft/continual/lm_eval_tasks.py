"""Tasks of EleutherAI's lm-evaluation-harness (the package lm_eval): one score for each task."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .settings import StreamError, did_you_mean

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from torch import nn
    from transformers import PreTrainedTokenizerBase

MAIN_METRICS = ("acc_norm", "acc", "exact_match", "em", "f1", "word_perplexity", "perplexity", "bleu", "rougeL")
"""The score of a task is the first of these metrics that it has, or else its first metric."""


def require_tasks(names: Sequence[str]) -> None:
    """Raise StreamError if lm_eval is not installed or does not know a task or group."""
    try:
        manager = _task_manager()
    except ImportError as error:
        raise StreamError(f"lm_eval needs the package lm_eval: pip install fggm-peft[general] ({error})") from error
    known = {*manager.all_subtasks, *manager.all_groups}
    for name in names:
        if name in manager.all_tags:
            raise StreamError(f"lm_eval: {name!r} is a tag, which has no score; name its tasks")
        if name not in known:
            raise StreamError(f"lm_eval: no task {name!r} in lm_eval{did_you_mean(name, known)}")


@lru_cache
def require_data(names: tuple[str, ...]) -> None:
    """Load the tasks' data; this downloads data that is not in the cache.

    Raises:
        StreamError: it cannot be loaded, a task is named twice (by its name and by a group), a group has no score of
            its own, or a task would run code that the model writes.
    """
    try:
        with _quiet():
            loaded = _task_manager().load(list(names))
    except Exception as error:  # of lm_eval, of datasets, or of a task's own functions
        reason = " ".join(str(error).split())
        raise StreamError(f"general.lm_eval: cannot load {', '.join(names)}: {reason}") from error
    if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise StreamError(f"general.lm_eval: {unsafe[0]} runs code that the model writes; remove it")
    groups = loaded["groups"]
    if without := [name for name in names if name in groups and not groups[name].aggregate_metric_list]:
        raise StreamError(f"general.lm_eval: the group {without[0]!r} has no score; name its tasks")


def task_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The score of each task or group: ``{"value", "metric"}``.

    The metric has the name of lm_eval, such as "acc_norm", with the filter if there is one, such as
    "exact_match,strict-match". Training modes and the random state of torch, numpy and Python change; the caller
    restores them.

    Args:
        limit: number of examples of each task, the first ones.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        results: Any = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),  # type: ignore[arg-type]
            tasks=list(names),
            task_manager=_task_manager(),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    return {name: _score(results["results"][name]) for name in names}


@lru_cache
def _task_manager() -> TaskManager:
    """The index of all tasks; building it takes seconds."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress lm_eval's warnings about its own command line."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _score(row: Mapping[str, Any]) -> dict[str, Any]:
    """The main metric among a task's entries, such as "acc,none" and "acc_stderr,none"."""
    numbers = {key: value for key, value in row.items() if "," in key and isinstance(value, (int, float))}
    metrics = [key for key in numbers if not key.split(",")[0].endswith("_stderr")]
    ranks = {metric: rank for rank, metric in enumerate(MAIN_METRICS)}
    key = min(metrics, key=lambda key: ranks.get(key.split(",")[0], len(ranks)))  # the first one of several equals
    return {"value": float(numbers[key]), "metric": key.removesuffix(",none")}

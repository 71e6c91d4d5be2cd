"""Metrics of tasks: functions of one prediction and its reference, with values in [0, 1].

None of them needs a download. The streams ``trace-order1`` and ``trace-order2`` say which ones TRACE uses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ..core import Registry

_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)

METRICS: Registry[Callable[..., float]] = Registry("metric")
"""Name -> function of a prediction, its reference and the prompt (``source``), with a value in [0, 1]."""


@METRICS.register("accuracy")
def accuracy(prediction: str, reference: str, source: str = "") -> float:
    """Whether the labels are equal: the first lines, with any amount of space between words.

    Only the first line counts, because an answer of ScienceQA is a letter and then a line of reasons.
    """
    label = _first_line(reference)
    if not label:
        raise ValueError("the reference is empty, so there is no label")
    return float(_first_line(prediction) == label)


@METRICS.register("exact_match")
def exact_match(prediction: str, reference: str, source: str = "") -> float:
    """Whether the texts are equal except for surrounding space, as in ``fggm eval --generate``."""
    return float(prediction.strip() == reference.strip())


@METRICS.register("rouge_l")
def rouge_l(prediction: str, reference: str, source: str = "") -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, on the whole text at once.

    Words are runs of letters and digits in lower case, as in ``rouge_score`` without stemming, but of any script; a
    Chinese character is a word. (``rouge_score`` drops all characters but Latin ones.) A text without words scores 0,
    unless both texts have none.
    """
    return _common_share(_WORD.findall(prediction.lower()), _WORD.findall(reference.lower()))


@METRICS.register("edit_similarity")
def edit_similarity(prediction: str, reference: str, source: str = "") -> float:
    """``1 - d / (len(a) + len(b))``, with d insertions and deletions of characters that turn one text into the other.

    The ``fuzz.ratio`` of CodeXGLUE's and TRACE's code completion (Lu et al. 2021), in [0, 1] and not rounded to per
    cent. As there, the literals of Py150 are restored first: ``<NUM_LIT:2>`` becomes ``2``.
    """
    return _common_share(_restored(prediction).strip(), _restored(reference).strip())


def task_score(name: str, predictions: Sequence[str], references: Sequence[str], sources: Sequence[str]) -> float:
    """The mean of a metric over all samples; ``sources`` are the prompts."""
    scores = sample_scores(name, predictions, references, sources)
    return sum(scores) / len(scores)


def sample_scores(
    name: str, predictions: Sequence[str], references: Sequence[str], sources: Sequence[str]
) -> list[float]:
    """The score of every sample.

    Raises:
        ValueError: a sample cannot be scored. The message contains its number (from 1) and the start of its texts.
    """
    metric, scores = METRICS[name], []
    for number, texts in enumerate(zip(predictions, references, sources, strict=True), start=1):
        try:
            scores.append(metric(*texts))
        except Exception as error:
            shown = f"prediction {texts[0]!r:.60}, reference {texts[1]!r:.60}"
            raise ValueError(f"{name} cannot score sample {number} ({error}): {shown}") from error
    return scores


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return " ".join(lines[0].split()) if lines else ""


def _restored(code: str) -> str:
    for empty, value in (("<NUM_LIT>", "0"), ("<STR_LIT>", ""), ("<CHAR_LIT>", "")):
        code = code.replace(empty, value)
    return _LITERAL.sub(r"\1", code)


def _common_share(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of the longest common subsequence; 1 if both are empty."""
    from rapidfuzz.distance import LCSseq

    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b)) if a or b else 1.0

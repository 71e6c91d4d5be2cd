r"""What an answer is worth: the metrics of tasks, each a function of one prediction and its reference, in [0, 1].

``load_metric`` gives them the interface of 🤗 Evaluate. Nothing is downloaded for the ones named here, which are
those that TRACE (Wang et al. 2023, arXiv 2310.06762) judges its tasks by, and two more:

============ =============== ==================================================================
task         metric          what TRACE's own scripts do
============ =============== ==================================================================
C-STANCE     accuracy        the whole answers are equal
FOMC         accuracy        the whole answers are equal
MeetingBank  rouge_l         F of the package ``rouge``, tokens split at spaces
Py150        edit_similarity ``fuzzywuzzy.fuzz.ratio`` in whole per cent, literals restored
ScienceQA    accuracy        the first letters are equal (the answer is a letter, then reasons)
NumGLUE-cm   accuracy        the whole answers are equal
NumGLUE-ds   accuracy        the whole answers are equal
20Minuten    sari            ``sari`` of 🤗 datasets, 0 to 100, prompts as sources
============ =============== ==================================================================
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.registry import Registry

if TYPE_CHECKING:
    import evaluate


class MetricError(ValueError):
    """A metric that cannot be loaded, or a sample that cannot be scored; names the metric and the sample."""


def accuracy(prediction: str, reference: str) -> float:
    """Whether the labels are equal: the first lines, without regard to the amount of space.

    The first line, because an answer of ScienceQA is a letter and then a line of reasons.
    """
    label = _first_line(reference)
    if not label:
        raise ValueError("the reference is empty, so there is no label")
    return float(_first_line(prediction) == label)


def exact_match(prediction: str, reference: str) -> float:
    """Whether the texts are equal but for surrounding space, as ``fggm eval --generate`` counts it."""
    return float(prediction.strip() == reference.strip())


def f1(prediction: str, reference: str) -> float:
    """F1 of the bags of words, as SQuAD has it (Rajpurkar et al. 2016): lower case, no punctuation, no articles.

    Words are split at spaces. Two texts without words are equal: 1.
    """
    written, wanted = _squad_words(prediction), _squad_words(reference)
    if not written or not wanted:
        return float(written == wanted)
    return _f(sum((Counter(written) & Counter(wanted)).values()), len(written), len(wanted))


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, on the whole text at once.

    Words are runs of letters and digits in lower case, as in ``rouge_score`` without stemming, but of any script; a
    Chinese character is a word. A text without words scores 0, unless both have none.
    """
    written, wanted = _words(prediction), _words(reference)
    if not written or not wanted:
        return float(written == wanted)
    return _f(longest_common_subsequence(written, wanted), len(written), len(wanted))


def edit_similarity(prediction: str, reference: str) -> float:
    """``1 - d / (len(a) + len(b))``, with d insertions and deletions of characters that make one of the other.

    The ``fuzz.ratio`` of CodeXGLUE's and TRACE's code completion (Lu et al. 2021), as rapidfuzz computes it, in [0, 1]
    and not rounded to per cent. Like both, it first writes the literals of Py150 back: ``<NUM_LIT:2>`` is ``2``.
    """
    a, b = _restored(prediction).strip(), _restored(reference).strip()
    return 2 * longest_common_subsequence(a, b) / (len(a) + len(b)) if a or b else 1.0


def sari(prediction: str, references: Sequence[str], source: str) -> float:
    """SARI (Xu et al. 2016): how well words of the source were kept or deleted, and others added, over 1- to 4-grams.

    ``(F1_keep + P_delete + F1_add) / 3`` as the ``sari`` of 🤗 Evaluate has it: 0/0 is 1, lower case, tokens of
    mteval-v13a. In [0, 1], where papers print per cent.
    """
    texts = [_mteval_tokens(text) for text in (source, prediction, *references)]
    total = 0.0
    for n in range(1, 5):
        start, written, *wanted = (_grams(text, n) for text in texts)
        total += sum(_sari_of_grams(start, written, wanted))
    return total / 12


@dataclass(frozen=True)
class SampleMetric:
    """How one answer is scored.

    Args:
        score: ``(prediction, reference)`` -> [0, 1], or ``(prediction, reference, source)``.
        needs_source: whether it takes the text that the answer was made from.
    """

    score: Callable[..., float]
    needs_source: bool = False


METRICS: Registry[SampleMetric] = Registry("metric")
for _name, _metric in {
    "accuracy": SampleMetric(accuracy),
    "exact_match": SampleMetric(exact_match),
    "f1": SampleMetric(f1),
    "rouge_l": SampleMetric(rouge_l),
    "edit_similarity": SampleMetric(edit_similarity),
    "sari": SampleMetric(lambda prediction, reference, source: sari(prediction, [reference], source), True),
}.items():
    METRICS.register(_name)(_metric)


def sample_scores(
    name: str, predictions: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
) -> list[float]:
    """The score of every sample; the metric of a task is their mean.

    Raises:
        MetricError: there are no samples, not as many of each, no sources where they are needed, or a sample cannot
            be scored; it names the sample (counted from 1) and shows the beginning of its texts.
    """
    metric = METRICS[name]
    columns = [predictions, references]
    if metric.needs_source:
        if sources is None:
            raise MetricError(f"{name} needs sources: the texts that the predictions were made from")
        columns.append(sources)
    if len({len(column) for column in columns}) > 1 or not len(predictions):
        raise MetricError(
            f"{name} needs as many predictions as references{' and sources' if metric.needs_source else ''}, and at "
            f"least one; got {', '.join(str(len(column)) for column in columns)}"
        )
    return [_scored(name, metric, number, texts) for number, texts in enumerate(zip(*columns, strict=True), start=1)]


def _scored(name: str, metric: SampleMetric, number: int, texts: tuple[str, ...]) -> float:
    try:
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is not a text")
        return metric.score(*texts)
    except Exception as error:
        shown = ", ".join(
            f"{what} {_shortened(text)}" for what, text in zip(("prediction", "reference"), texts, strict=False)
        )
        raise MetricError(f"{name} cannot score sample {number} ({error}): {shown}") from error


def _shortened(text: Any, length: int = 60) -> str:
    shown = repr(text)
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."


def load_metric(name: str) -> evaluate.EvaluationModule:
    """The metric as 🤗 Evaluate has them: ``.compute(predictions=, references=)``, and ``sources=`` for SARI.

    A name of ``METRICS`` is this package's and needs no network. Any other goes to ``evaluate.load``, which runs the
    code that it finds under that name: in a folder here, or on the Hub. Their scales differ: some go to 100.

    Raises:
        MetricError: it cannot be loaded.
    """
    try:
        import evaluate
    except ImportError as error:
        raise MetricError("metrics need the package evaluate: pip install fggm-peft[continual]") from error
    if name in METRICS:
        from .evaluate_metric import TaskMetric

        return TaskMetric(name)
    try:
        return evaluate.load(name)
    except Exception as error:  # code of strangers raises whatever its authors thought of
        reason = " ".join(str(error).split())
        raise MetricError(
            f"no metric {name!r}: this package has {', '.join(METRICS)}, and evaluate cannot load it: {reason}"
        ) from error


# --- words ---------------------------------------------------------------------------------------

_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)
_MTEVAL_RULES = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),  # punctuation but . , - '
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),  # a point or comma, unless between digits
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # a dash after a digit
)


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return " ".join(lines[0].split()) if lines else ""


def _squad_words(text: str) -> list[str]:
    return _ARTICLE.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _restored(code: str) -> str:
    for empty, value in (("<NUM_LIT>", "0"), ("<STR_LIT>", ""), ("<CHAR_LIT>", "")):
        code = code.replace(empty, value)
    return _LITERAL.sub(r"\1", code)


def _mteval_tokens(text: str) -> list[str]:
    """Tokens of the NIST script mteval-v13a, by which SacreBLEU and SARI split words, in lower case."""
    text = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = f" {text} "
    for rule, replacement in _MTEVAL_RULES:
        text = rule.sub(replacement, text)
    return text.split()


# --- counts --------------------------------------------------------------------------------------


def longest_common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Its length, by Hyyrö's bit vectors (2004): a row of the table is one integer, so long texts take no patience."""
    positions: dict[Hashable, int] = {}
    for i, item in enumerate(a):
        positions[item] = positions.get(item, 0) | 1 << i
    everywhere = row = (1 << len(a)) - 1
    for item in b:
        matches = row & positions.get(item, 0)
        row = (row + matches | row - matches) & everywhere
    return len(a) - row.bit_count()


def _f(common: float, written: int, wanted: int) -> float:
    """F1 of the precision ``common / written`` and the recall ``common / wanted``."""
    return 2 * common / (written + wanted)


def _grams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _sari_of_grams(source: Counter, written: Counter, references: list[Counter]) -> tuple[float, float, float]:
    """F1 of what was kept, precision of what was deleted, F1 of what was added.

    Counts of source and prediction are multiplied by the number of references, as a word that all of these have
    counts once for each.
    """
    wanted = sum(references, Counter())
    source, written = (Counter({gram: n * len(references) for gram, n in c.items()}) for c in (source, written))

    kept, to_keep = source & written, source & wanted
    well_kept = kept & to_keep
    precision = _share(sum(well_kept[gram] / kept[gram] for gram in well_kept), len(kept))
    keep = _harmonic(precision, _share(well_kept.total(), to_keep.total()))

    deleted = source - written
    delete = _share(sum(n / deleted[gram] for gram, n in (deleted - wanted).items()), len(deleted))

    added, to_add = written.keys() - source.keys(), wanted.keys() - source.keys()
    add = _harmonic(_share(len(added & to_add), len(added)), _share(len(added & to_add), len(to_add)))
    return keep, delete, add


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0

"""How many samples does a selection need? Its regret, and the share of the score that small samples find.

python benchmarks/samples.py MODEL TASK [TASK ...] --general TEXT [--samples 1024]

MODEL is a folder or Hub id of a causal language model, TASK a folder with ``train.json`` in TRACE's format, TEXT a file
of plain text in paragraphs. One pass over each task serves all granularities, densities and numbers of samples. It
collects rows and columns of all linear layers and elements of every tenth block, in two halves of the samples, and
selects whenever the number of samples has doubled.

Each curve in the result file has these values for every number of samples ``n`` in ``counts``:

- ``regret``: as in ``SelectionReport``, of two halves of n/2 samples each.
- ``score_held``: score of the support of n/2 samples, measured on the other half of all samples, over the score of the
  support of its own half of all samples.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import show, write
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from fggm_peft import CRITERIA, FGGMConfig, TopDensity, select_parameters
from fggm_peft.core.criteria import Quantities
from fggm_peft.core.granularity import Rows, granularity_from
from fggm_peft.plots import legend, looks, new_figure, save, style
from fggm_peft.selection.data_pass import DataPass, Totals
from fggm_peft.selection.regret import MAX_SAMPLES, MIN_SAMPLES, regret_of
from fggm_peft.training.data import DataSource, Example, TokenizedExamples, load_examples, padding_on_the_right
from fggm_peft.tuner.layer import FGGMLayer
from fggm_peft.tuner.support import Choice
from fggm_peft.tuner.target import find_targets

DENSITIES = (0.05, 0.1, 0.3)
EVERY = 10  # elements are collected in every tenth block
GRANULARITIES = ("row", "column", "element")
BATCH_SIZE, MAX_LENGTH = 8, 128
TIMED_SAMPLES = 32

Layers = dict[str, FGGMLayer]
Choices = dict[str, Choice]


@dataclass(frozen=True)
class Case:
    """A selection: criterion, granularity and density."""

    criterion: str
    granularity: str
    density: float

    @property
    def kind(self):
        return granularity_from(self.granularity)


FISHER = [Case("fisher", granularity, density) for granularity in GRANULARITIES for density in DENSITIES]
WEIGHED = [Case("gain_per_harm", "column", density) for density in DENSITIES]


class RowsAndColumns(Rows):
    """Rows and columns in one vector ``[o + i]``, for a pass that serves both."""

    def units(self, shape):
        return shape[0] + shape[1]

    def accumulate_(self, scores, gradients, half):
        both = torch.cat([gradients.row_scores(), gradients.column_scores()], dim=1)
        scores.index_add_(0, half.to(scores.device), both.to(scores.dtype))


def units_of(case: Case, layer: FGGMLayer, statistics: Tensor) -> Tensor | None:
    """Rows, columns or elements from the statistics of a layer; None if its elements were not collected."""
    outputs, inputs = layer.weight_shape
    if len(statistics) == outputs * inputs:
        return case.kind.reduce(statistics.view(outputs, inputs))
    return {"row": statistics[:outputs], "column": statistics[outputs:]}.get(case.granularity)


def scored(case: Case, layer: FGGMLayer, task: Tensor, reference: Tensor | None) -> Tensor:
    """Scores of the criterion for Fisher information ``[units]``."""
    against: dict[str, Any] = {}
    if CRITERIA[case.criterion].reference:
        entries = layer.weight_shape[0] * layer.weight_shape[1]
        mean = {"fisher": float(reference.double().sum()) / entries}
        against = {"reference": {"fisher": reference}, "reference_mean": mean}
    quantities = Quantities(
        case.kind, layer.weight_shape, layer.weight_copy, torch.Generator(), {"fisher": task}, **against
    )
    return CRITERIA[case.criterion].score(quantities)


@dataclass
class Study:
    """Selects whenever the number of samples has doubled, and compares the supports.

    Args:
        layers: module path -> layer.
        cases: the selections to make.
        score: (case, module path, statistics of the module) -> scores ``[units]``; None if the case has none.
    """

    layers: Layers
    cases: list[Case]
    score: Callable[[Case, str, Tensor], Tensor | None]
    chosen: dict[tuple[int, Case], Choices] = field(default_factory=dict)  # from the even samples
    regret: dict[Case, dict[int, float | None]] = field(default_factory=dict)
    seconds: float = 0.0

    def take(self, totals: Totals) -> bool:
        """Select from the samples so far. Returns False: the pass continues."""
        start, samples = time.perf_counter(), totals.samples
        for case in self.cases:
            scores = [dict(self._scores(case, totals, half)) for half in (0, 1)]
            choices = [self._choose(case, half) for half in scores]
            self.chosen[samples, case] = choices[0]
            pairs = [
                (held(scores[1 - half], choices[half], name), held(scores[1 - half], choices[1 - half], name))
                for half in (0, 1)
                for name in scores[0]
            ]
            self.regret.setdefault(case, {})[samples] = regret_of(pairs)
        self.seconds += time.perf_counter() - start
        return False

    def curves(self, totals: Totals) -> Iterator[dict[str, Any]]:
        """The curves of each case, by the number of samples."""
        if totals.samples not in self.regret.get(self.cases[0], {}):
            self.take(totals)
        for case in self.cases:
            counts, others = list(self.regret[case]), dict(self._scores(case, totals, 1))
            even = [self.chosen[n, case] for n in counts]
            yield {
                "criterion": case.criterion,
                "granularity": case.granularity,
                "density": case.density,
                "regret": list(self.regret[case].values()),
                "score_held": [score_held(others, choices, even[-1]) for choices in even],
                "samples_for": {str(most): samples_for(self.regret[case], most) for most in (0.05, 0.02, 0.01)},
            }

    def _choose(self, case: Case, scores: Mapping[str, Tensor]) -> Choices:
        policy, result = TopDensity(case.density), {}
        for name, vector in scores.items():
            (indices,) = policy.choose([vector], [1])
            result[name] = Choice(indices)
        return result

    def _scores(self, case: Case, totals: Totals, half: int | None) -> Iterator[tuple[str, Tensor]]:
        for name in self.layers:
            scores = self.score(case, name, totals.mean(name, "fisher", half))
            if scores is not None:
                yield name, scores


def held(scores: Mapping[str, Tensor], choices: Choices, name: str) -> float:
    """The score of the units that were chosen in a module."""
    return float(scores[name][choices[name].indices].double().sum())


def score_held(scores: Mapping[str, Tensor], chosen: Choices, largest: Choices) -> float:
    """The score of a support on other samples, over the score of the support of the largest sample.

    Mean over modules, because the threshold is applied to each module.
    """
    return sum(held(scores, chosen, name) / held(scores, largest, name) for name in scores) / len(scores)


def samples_for(regrets: Mapping[int, float | None], most: float) -> int | None:
    """The first number of samples with at most this regret. ``"auto"`` stops there. None if the regret stays higher."""
    return min((n for n, regret in regrets.items() if regret is not None and regret <= most), default=None)


class Model:
    """A base model, and selections on it in bfloat16 autocast."""

    def __init__(self, name: str):
        self.name, self.tokenizer = name, AutoTokenizer.from_pretrained(name)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def batches(self, examples: list[Example]) -> DataLoader:
        data: Any = TokenizedExamples(examples, self.tokenizer, MAX_LENGTH)
        return DataLoader(data, batch_size=BATCH_SIZE, collate_fn=padding_on_the_right(self.tokenizer))

    def adapted(self, **config: Any) -> Any:
        base = AutoModelForCausalLM.from_pretrained(self.name, dtype=torch.float32)
        return get_peft_model(base, FGGMConfig(task_type="CAUSAL_LM", target_modules="all-linear", **config))

    def study(self, examples: list[Example], cases: list[Case], score: Callable) -> tuple[Study, Totals]:
        """One pass that collects rows and columns, and the elements of every tenth block.

        Args:
            score: (case, layer, module path, statistics) -> scores, see ``Study``.
        """
        model = self.adapted(granularity="element")
        layers = {path: target.layer for path, target in find_targets(model, "default").items()}
        for name, layer in layers.items():
            if int(re.search(r"\.(\d+)\.", name)[1]) % EVERY:
                layer.granularity["default"] = RowsAndColumns()
        study = Study(layers, cases, lambda case, name, statistics: score(case, layers[name], name, statistics))
        data = DataPass(model, model.peft_config["default"], self.batches(examples), progress=True)
        with torch.autocast("cpu", torch.bfloat16):
            totals = data.run(find_targets(model, "default"), None, study.take, MIN_SAMPLES, "Samples")
        return study, totals

    def speed(self, examples: list[Example], granularity: str) -> dict[str, Any]:
        """Time of ``select_parameters`` on a few samples."""
        model = self.adapted(granularity=granularity, density=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            report = select_parameters(model, self.batches(examples), TIMED_SAMPLES, progress=False)
        return {"samples": report.samples, "seconds": report.seconds}


def measure_reference(model: Model, text: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fisher information of a general text by module, and the regret of its column rankings."""
    paragraphs = [Example("", part.strip()) for part in text.read_text(encoding="utf-8").split("\n\n") if part.strip()]

    def score(case: Case, layer: FGGMLayer, name: str, statistics: Tensor) -> Tensor:
        harm = units_of(case, layer, statistics)
        return scored(case, layer, torch.ones_like(harm), harm)  # as if all gains were equal

    study, totals = model.study(paragraphs, WEIGHED, score)
    measured = {"curves": list(study.curves(totals)), "counts": list(study.regret[WEIGHED[0]])}
    return {name: totals.mean(name, "fisher").clone() for name in study.layers}, measured


def measure(model: Model, task: Path, limit: int, reference: Mapping[str, Tensor]) -> dict[str, Any]:
    """All curves of one task, and the time of its selections."""
    examples = load_examples(DataSource(str(task)), model.tokenizer, limit)

    def score(case: Case, layer: FGGMLayer, name: str, statistics: Tensor) -> Tensor | None:
        task = units_of(case, layer, statistics)
        return None if task is None else scored(case, layer, task, units_of(case, layer, reference[name]))

    start = time.perf_counter()
    study, totals = model.study(examples, FISHER + WEIGHED, score)
    curves = list(study.curves(totals))
    return {
        "counts": list(study.regret[FISHER[0]]),
        "seconds": time.perf_counter() - start,
        "choosing_seconds": study.seconds,
        "curves": curves,
        "speed": {name: model.speed(examples, name) for name in GRANULARITIES},
    }


@style()
def draw(results: dict[str, Any], path: Path) -> None:
    """For each task at 10 % density: the regret, and below it the share of the score that is found."""
    names = {"row": "Fisher, rows", "column": "Fisher, columns", "element": "Fisher, elements"}
    tasks = results["tasks"]
    figure, axes = new_figure(0.3 + 4.2 * len(tasks), rows=2 * len(tasks))
    for number, (task, measured) in enumerate(tasks.items()):
        curves = {
            names[c["granularity"]] if c["criterion"] == "fisher" else "gain per harm, columns": c
            for c in measured["curves"]
            if c["density"] == 0.1
        }
        styles = looks(list(curves))
        above, below = axes[2 * number : 2 * number + 2]
        # the scores of a half: a selection from n samples is that of 2n in the figures
        halves = [count // 2 for count in measured["counts"][:-1]]
        for name, curve in curves.items():
            above.plot(measured["counts"], curve["regret"], label=name, **styles[name])
            below.plot(halves, curve["score_held"][:-1], **styles[name])
        above.axhline(FGGMConfig().regret, linestyle="--")
        above.set(title=task, ylabel="regret", ylim=(0.0, 0.2))
        below.set(xlabel="samples", ylabel="score found", ylim=(0.9, 1.0))
        for panel, counts in ((above, measured["counts"]), (below, halves)):
            panel.set_xscale("log", base=2)
            panel.set_xticks(counts, [f"{count:,}" for count in counts])
            panel.minorticks_off()
    legend(axes[0])
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tasks", nargs="+", type=Path)
    parser.add_argument("--general", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=MAX_SAMPLES, help="maximum number of samples per task")
    arguments = parser.parse_args()
    model = Model(arguments.model)
    reference, measured = measure_reference(model, arguments.general)
    results = {"model": Path(arguments.model).name, "reference": measured, "tasks": {}}
    for task in arguments.tasks:
        results["tasks"][task.name] = measure(model, task, arguments.samples, reference)
        for figure in ("regret", "score_held"):
            counts, curves = results["tasks"][task.name]["counts"], results["tasks"][task.name]["curves"]
            title = "{criterion}, {granularity}s, {density:.0%}"
            rows = {title.format(**c): dict(zip(map(str, counts), c[figure], strict=True)) for c in curves}
            show(f"{task.name}: {figure} by the number of samples", rows)
    print("written to", write("samples", results))
    draw(results, Path(__file__).parent.parent / "docs" / "samples.png")


if __name__ == "__main__":
    main()

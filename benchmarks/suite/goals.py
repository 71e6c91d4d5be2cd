"""The goals of FGGM and their verdicts. A goal is one entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peers import LOOP

from .methods import COLUMNS, CONTIGUOUS, ELEMENTS, FGGM, ROWS, WEIGHT_GRADIENTS

Results = dict[str, dict[str, Any]]
Find = Callable[[dict[str, Any]], Iterator[float]]


@dataclass(frozen=True)
class Goal:
    """An upper limit for a ratio, in every table that contains the ratio.

    Args:
        what: the measurement and its settings.
        against: the denominator.
        limit: the largest ratio that meets the goal.
        table: name of the tables that contain the ratio.
        find: table -> its ratios; none if the goal does not apply to the table.
        reason: why the goal is missed, shown if it is.
        bound: work that no method can avoid, and its ratio in a table.
    """

    what: str
    against: str
    limit: float
    table: str
    find: Find
    reason: str = ""
    bound: tuple[str, Find] | None = None


@dataclass(frozen=True)
class Verdict:
    """A goal and its measured ratios.

    Args:
        ratios: key of a table -> the largest ratio in the table.
        bounds: key of a table -> the ratio of the work that no method can avoid.
    """

    goal: Goal
    ratios: dict[str, float]
    bounds: dict[str, float]

    @property
    def met(self) -> bool:
        return bool(self.ratios) and max(self.ratios.values()) <= self.goal.limit


def over(
    method: str, peer: str, figure: str = "ratio_min", when: Callable[[dict], bool] = lambda setting: True
) -> Find:
    """``figure`` of a method over that of a peer, if both were measured and the goal applies to the setting."""

    def find(table: dict[str, Any]) -> Iterator[float]:
        rows = table["rows"]
        is_measured = all(figure in rows.get(name, ()) for name in (method, peer))
        if is_measured and when(table.get("setting", {})):
            yield rows[method][figure] / rows[peer][figure]

    return find


def figure_of(method: str, figure: str) -> Find:
    def find(table: dict[str, Any]) -> Iterator[float]:
        if figure in table["rows"].get(method, ()):
            yield table["rows"][method][figure]

    return find


def over_peers(figure: str) -> Find:
    """Exact rows over each other library for per-sample gradients."""

    def find(table: dict[str, Any]) -> Iterator[float]:
        rows = table["rows"]
        for name in rows:
            if not name.startswith((LOOP, "torch.func", "Opacus", "BackPACK")):
                continue
            alone = figure == "peak_mib" and "ours_mib" in rows[name]
            ours = rows[name]["ours_mib"] if alone else rows["rows, exact"][figure]
            yield ours / rows[name][figure]

    return find


def short(setting: dict[str, Any]) -> bool:
    return setting["length"] <= 0.3 * setting["hidden"]


def dense(setting: dict[str, Any]) -> bool:
    return setting["base"] in ("float32", "bfloat16")


def four_bit(setting: dict[str, Any]) -> bool:
    return setting["base"] == "nf4"


def a_third(setting: dict[str, Any]) -> bool:
    return setting["density"] == 0.3


def ten_million(setting: dict[str, Any]) -> bool:
    return setting["density"] * setting["parameters"] > 7e6 and setting["density"] < 0.3


STEP, PASS = "training step", "selection pass"
FROZEN_PASS = "frozen forward and backward"
PEERS = "other ways to per-sample gradients; the largest ratio"
EQUAL_LORA, EQUAL_SHIRA = "LoRA of equal size", "SHiRA of equal size"
SCATTERED = (
    "Every entry is read, saved for unmerging, added and written, one row or one entry at a time, and small layers "
    "also spend time on the calls. A LoRA's product has the size of the weight at every rank, and is cheapest for "
    "small weights."
)
MOVED = ("moving as many values in contiguous memory", over(CONTIGUOUS, "LoRA"))
INDICES = "Every element has an index, which is decoded and checked. A LoRA has no indices."

GOALS: tuple[Goal, ...] = (
    Goal(
        f"{PASS}, rows, exact, T ≤ 0.3 × hidden",
        FROZEN_PASS,
        1.15,
        PASS,
        over("rows, exact", "frozen", when=short),
        "The Gram matrix of an input costs T / hidden of a product, which is a large part in narrow models.",
    ),
    Goal(
        f"{PASS}, elements",
        FROZEN_PASS,
        1.3,
        PASS,
        over("elements, exact", "frozen"),
        "Below about 100 positions, reading and writing the sums of a weight takes longer than the products.",
        bound=("computing the gradients of all weights", over(WEIGHT_GRADIENTS, "frozen")),
    ),
    Goal(f"{PASS}, rows, exact: time", PEERS, 1.0, PASS, over_peers("ratio_min")),
    Goal(f"{PASS}, rows, exact: peak memory", PEERS, 1.0, PASS, over_peers("peak_mib")),
    Goal(
        f"{STEP}, rows",
        EQUAL_LORA,
        0.9,
        STEP,
        over(ROWS, "LoRA", when=dense),
        "A small LoRA costs little more than the frozen model, which is a lower limit for every method.",
    ),
    Goal(f"{STEP}, rows: peak memory", EQUAL_LORA, 1.05, STEP, over(ROWS, "LoRA", "peak_mib", dense)),
    Goal(
        f"{STEP}, elements",
        EQUAL_SHIRA,
        0.75,
        STEP,
        over(ELEMENTS, "SHiRA", when=dense),
        "Both methods multiply with the whole weight, including the selected entries, and this product takes most of a "
        "step. The rest of SHiRA's step is too short to save 25 %.",
    ),
    Goal(f"{STEP}, elements: peak memory", EQUAL_SHIRA, 1.0, STEP, over(ELEMENTS, "SHiRA", "peak_mib", dense)),
    Goal(
        f"{STEP}, 30 % rows",
        "full fine-tuning with a gradient mask",
        0.85,
        STEP,
        over(ROWS, "full, masked", when=a_third),
        "FGGM saves 70 % of the weight gradients, which are a third of a step's products, and their optimizer steps. "
        "The copies of the weights that contain the selected rows cost a part of these savings.",
    ),
    Goal(
        f"{STEP}, 30 % rows: peak memory",
        "full fine-tuning with a gradient mask",
        0.85,
        STEP,
        over(ROWS, "full, masked", "peak_mib", a_third),
        "If activations and logits are most of the peak, gradients and optimizer state are a small part of it.",
    ),
    Goal(
        f"{STEP}, rows, 4-bit base: peak memory",
        "QLoRA of equal size",
        1.05,
        STEP,
        over(ROWS, "LoRA", "peak_mib", four_bit),
        "The active layer has a dequantized copy of its weight that contains the selected rows.",
    ),
    Goal(
        "training step with harm decay, 30 % columns, 512 tokens",
        "without harm decay",
        1.05,
        "step with harm decay",
        over("harm decay", "without harm decay", when=a_third),
    ),
    Goal(
        "statistics of harm decay, 32 paragraphs",
        "64 forward passes",
        1.0,
        "statistics of harm decay",
        over("statistics", "64 forward passes"),
    ),
    Goal(
        "statistics of harm decay: size",
        "the model",
        0.03,
        "statistics of harm decay",
        figure_of("statistics", "share_of_base"),
        "A sketch has 128 numbers per input feature, also if there are few output features, so narrow models miss it.",
    ),
    Goal("merge and unmerge, rows", "LoRA", 0.1, "merge and unmerge", over(ROWS, "LoRA"), SCATTERED, MOVED),
    Goal("merge and unmerge, elements", "LoRA", 0.25, "merge and unmerge", over(ELEMENTS, "LoRA"), SCATTERED, MOVED),
    Goal(
        "switching a merged model, rows",
        "LoRA's unmerge and merge",
        0.1,
        "switch",
        over(ROWS, "LoRA"),
        SCATTERED,
        MOVED,
    ),
    Goal(
        "switching a merged model, elements",
        "LoRA's unmerge and merge",
        0.25,
        "switch",
        over(ELEMENTS, "LoRA"),
        SCATTERED,
        MOVED,
    ),
    Goal("loading 10 M values, rows", "LoRA", 1.0, "load", over(ROWS, "LoRA", when=ten_million)),
    Goal("loading 10 M values, columns", "LoRA", 1.0, "load", over(COLUMNS, "LoRA", when=ten_million)),
    Goal("loading 10 M values, elements", "LoRA", 1.0, "load", over(ELEMENTS, "LoRA", when=ten_million), INDICES),
    *(
        Goal(f"file, {kind}s", "the entropy bound", 1.1, "file", figure_of(name, "over_bound"))
        for name, kind in FGGM.items()
    ),
    Goal("import", "import of peft", 1.05, "import", over("fggm_peft", "peft")),
)


def verdicts(results: Results) -> list[Verdict]:
    """The verdict of each goal."""
    all_verdicts = []
    for goal in GOALS:
        bounds = _largest(goal.bound[1], goal.table, results) if goal.bound else {}
        all_verdicts.append(Verdict(goal, _largest(goal.find, goal.table, results), bounds))
    return all_verdicts


def _largest(find: Find, name: str, results: Results) -> dict[str, float]:
    """The largest ratio in each table of that name, by its key."""
    tables = {key: list(find(table)) for key, table in results.items() if key.partition(": ")[0] == name}
    return {key: max(values) for key, values in tables.items() if values}

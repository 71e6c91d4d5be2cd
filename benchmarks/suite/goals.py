"""What FGGM is to reach, and what of it was reached. A goal is one entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peers import LOOP

from .methods import COLUMNS, ELEMENTS, FGGM, ROWS

Results = dict[str, dict[str, Any]]
Find = Callable[[dict[str, Any]], Iterator[float]]


@dataclass(frozen=True)
class Goal:
    """A ratio that is to stay below a limit, in every table that has it.

    Args:
        what: is measured, at which settings.
        against: what it is divided by.
        limit: the most that it may be.
        table: name of the tables that have it.
        find: a table -> the ratios in it; none where the goal does not hold.
        reason: what keeps it from being reached, shown where it is not; at which sizes, and why.
    """

    what: str
    against: str
    limit: float
    table: str
    find: Find
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """A goal and all ratios that were measured for it: key of the table -> the worst of the table."""

    goal: Goal
    ratios: dict[str, float]

    @property
    def met(self) -> bool:
        return bool(self.ratios) and max(self.ratios.values()) <= self.goal.limit


def over(method: str, peer: str, figure: str = "seconds", when: Callable[[dict], bool] = lambda setting: True) -> Find:
    """``figure`` of a method over that of a peer, where both were measured and the setting is one it is meant for."""

    def find(table: dict[str, Any]) -> Iterator[float]:
        rows = table["rows"]
        there = all(figure in rows.get(name, ()) for name in (method, peer))
        if there and when(table.get("setting", {})):
            yield rows[method][figure] / rows[peer][figure]

    return find


def figure_of(method: str, figure: str) -> Find:
    def find(table: dict[str, Any]) -> Iterator[float]:
        if figure in table["rows"].get(method, ()):
            yield table["rows"][method][figure]

    return find


def over_peers(figure: str) -> Find:
    """Exact rows over each other way to per-sample gradients."""

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
PEERS = "naive loop, Opacus, BackPACK, torch.func; the worst"
EQUAL_LORA, EQUAL_SHIRA = "LoRA with as many trainable values", "SHiRA with as many trainable values"
DENSER = (
    "In small layers the calls take the time, about 0.2 ms a layer. In large ones every entry is read, added, "
    "compared with what was meant (the report, a quarter of the time), kept for unmerging and written, bound by "
    "memory; a LoRA's product has the size of the weight at every rank, and costs least where weights are small."
)
INDICES = "Single entries have an index each, which has to be decoded and checked; a LoRA's factors have none."

GOALS: tuple[Goal, ...] = (
    Goal(
        f"{PASS}, rows, exact, T ≤ 0.3 × hidden",
        FROZEN_PASS,
        1.15,
        PASS,
        over("rows, exact", "frozen", when=short),
        "The Gram matrix of an input costs T / hidden of a product; narrow models have little else to hide it behind.",
    ),
    Goal(
        f"{PASS}, rows, sketch",
        FROZEN_PASS,
        1.06,
        PASS,
        over("rows, sketch", "frozen"),
        "Reading inputs and gradients once more takes as long as ever, and narrow models or few positions have few "
        "products to cover it.",
    ),
    Goal(
        f"{PASS}, elements",
        FROZEN_PASS,
        1.5,
        PASS,
        over("elements, exact", "frozen"),
        "Below about 100 positions the sums of a weight are read and written for few products: memory decides.",
    ),
    Goal(f"{PASS}, rows, exact: time", PEERS, 1.0, PASS, over_peers("seconds")),
    Goal(f"{PASS}, rows, exact: peak memory", PEERS, 1.0, PASS, over_peers("peak_mib")),
    Goal(
        f"{STEP}, rows",
        EQUAL_LORA,
        0.9,
        STEP,
        over(ROWS, "LoRA", when=dense),
        "A LoRA of few values costs little more than the frozen model, and nothing that trains can cost less.",
    ),
    Goal(f"{STEP}, rows: peak memory", EQUAL_LORA, 1.05, STEP, over(ROWS, "LoRA", "peak_mib", dense)),
    Goal(
        f"{STEP}, elements",
        EQUAL_SHIRA,
        0.75,
        STEP,
        over(ELEMENTS, "SHiRA", when=dense),
        "Both multiply with a whole weight that has the entries in it, and that product is most of a step; what SHiRA "
        "does beyond it is too little to save more.",
    ),
    Goal(f"{STEP}, elements: peak memory", EQUAL_SHIRA, 1.0, STEP, over(ELEMENTS, "SHiRA", "peak_mib", dense)),
    Goal(
        f"{STEP}, 30 % rows",
        "full fine-tuning with a gradient mask",
        0.85,
        STEP,
        over(ROWS, "full, masked", when=a_third),
        "70 % of the weights' gradients are saved, which are a third of a step's products, and the optimizer's work on "
        "them; the copies of the weights with the chosen rows in them cost a part of that.",
    ),
    Goal(
        f"{STEP}, 30 % rows: peak memory",
        "full fine-tuning with a gradient mask",
        0.85,
        STEP,
        over(ROWS, "full, masked", "peak_mib", a_third),
        "Where activations and logits are most of the peak, gradients and optimizer state are little of it.",
    ),
    Goal(
        f"{STEP}, rows, 4-bit base: peak memory",
        "QLoRA with as many trainable values",
        1.05,
        STEP,
        over(ROWS, "LoRA", "peak_mib", four_bit),
        "The layer at work has its weight dequantized, with the chosen rows in it.",
    ),
    Goal("merge and unmerge, rows", "LoRA", 0.1, "merge and unmerge", over(ROWS, "LoRA"), DENSER),
    Goal("merge and unmerge, elements", "LoRA", 0.25, "merge and unmerge", over(ELEMENTS, "LoRA"), DENSER),
    Goal("switching a merged model, rows", "LoRA's unmerge and merge", 0.1, "switch", over(ROWS, "LoRA"), DENSER),
    Goal(
        "switching a merged model, elements", "LoRA's unmerge and merge", 0.25, "switch", over(ELEMENTS, "LoRA"), DENSER
    ),
    Goal("loading 10 M values, rows", "LoRA", 1.0, "load", over(ROWS, "LoRA", when=ten_million)),
    Goal("loading 10 M values, columns", "LoRA", 1.0, "load", over(COLUMNS, "LoRA", when=ten_million)),
    Goal("loading 10 M values, elements", "LoRA", 1.0, "load", over(ELEMENTS, "LoRA", when=ten_million), INDICES),
    *(
        Goal(f"file, {kind}s", "the values, and the entropy of which", 1.1, "file", figure_of(name, "over_bound"))
        for name, kind in FGGM.items()
    ),
    Goal("import", "import of peft", 1.05, "import", over("fggm_peft", "peft")),
)


def verdicts(results: Results) -> list[Verdict]:
    """Each goal with what was measured for it."""
    found = []
    for goal in GOALS:
        ratios = {}
        for key, table in results.items():
            if key.partition(": ")[0] == goal.table and (values := list(goal.find(table))):
                ratios[key] = max(values)
        found.append(Verdict(goal, ratios))
    return found

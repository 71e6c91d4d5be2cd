"""Settings of the selection: the units, the criterion, and the data that it reads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

from accelerate.utils.modeling import convert_file_size_to_int

from ...core.criteria import CRITERIA
from ...core.granularity import UnitKind
from .fields import is_integer, setting, written


@dataclass
class SelectionSettings:
    """Fields of ``FGGMConfig`` that say which units are selected by which criterion."""

    granularity: UnitKind = setting(
        "row",
        "Unit of the selection: 'row' (an output feature, as in the paper), 'column' (an input feature), 'element' (a "
        "single weight entry), or consecutive rows or columns: `RowBlocks(size=64)` ('row_block') and "
        "`ColumnBlocks(size=64)` ('column_block'). `NofM(n=2, m=4)` ('n_of_m'): elements, at most n of m "
        "consecutive ones. 'heads': attention heads, the same in the query, key, value and output layers.",
    )
    criterion: str = setting(
        "fisher",
        "Score of a unit. From the task's data: 'fisher' (diagonal Fisher information F). From the task's data and a "
        "`reference`: 'gain_per_harm' (sqrt(F) / F_ref), 'fisher_ratio' (F / F_ref), 'input_ratio' (columns, by "
        "forward passes), 'ssu' or 'ssu_inputs' (columns that the reference uses least), or 'gain_under_decay' (rows "
        "or columns, for `harm_decay`). Without data, when the adapter is created: 'random' or 'weight_magnitude'. Or "
        "a name that you registered in `fggm_peft.CRITERIA`.",
    )
    harm_decay: float = setting(
        0.0,
        "Strength of harm decay; 0 disables it, 80 is recommended. The delta decays in the directions that the inputs "
        "of the `reference` use. The strength is multiplied by the learning rate, like AdamW's weight decay. A higher "
        "value forgets and learns less. "
        "Trainers apply it; a plain loop calls `attach_harm_decay`.",
    )
    reference: Optional[Union[list[str], str]] = setting(
        None,
        "What the model should keep, for `harm_decay` and criteria with a reference: 'self' (text that the model "
        "writes itself), 'history' (the tasks selected on this model in this process), a file or folder with saved "
        "statistics (for `harm_decay` also a Hub id), or a list of these. `select_parameters(reference=...)` also "
        "accepts a dataloader of general text, and trainers accept the path of a text file (.txt).",
    )
    num_samples: Optional[Union[int, Literal["auto"]]] = setting(
        "auto",
        "Number of samples for the scores, None for all, or 'auto': 8, doubled up to 1024 until the `regret` is small.",
    )
    regret: float = setting(
        0.02,
        "Largest share of the best possible score that the selection may miss, estimated from two halves of the "
        "samples; num_samples='auto' stops there.",
    )
    score_memory: Optional[Union[int, str]] = setting(
        None,
        "Memory limit for running scores, in bytes or as '8GiB'; None: no limit. Above it the data is read several "
        "times. Element scores take 8 bytes per entry; scores of rows and columns take almost nothing.",
    )
    seed: int = setting(
        0, "Seed of random scores and of text that the model writes. The global random state is not changed."
    )
    selection: Optional[dict[str, Any]] = written("Result of the selection: samples, regret, density.")

    @property
    def is_chosen_without_data(self) -> bool:
        """Whether the support is chosen when the adapter is created, without ``select_parameters``."""
        return not CRITERIA[self.criterion].needs_data and not self.needs_covariance

    @property
    def needs_covariance(self) -> bool:
        """Whether the covariance of the layers' inputs on data to retain is needed."""
        return self.harm_decay > 0 or CRITERIA[self.criterion].uses_covariance

    @property
    def needs_reference(self) -> bool:
        return self.needs_covariance or bool(CRITERIA[self.criterion].reference)

    def _check_selection(self) -> None:
        criterion = CRITERIA[self.criterion]
        if not criterion.supports(self.granularity):
            kinds = {0: "'row'", 1: "'column'", None: "'row' or 'column'"}[criterion.weight_dim]
            raise ValueError(
                f"criterion {self.criterion!r} requires granularity={kinds}, got granularity='{self.granularity}'"
            )
        if not 0 <= self.harm_decay < math.inf:
            raise ValueError(f"harm_decay must be a number >= 0, got {self.harm_decay!r}")
        if criterion.uses_covariance and not self.harm_decay:
            text = (
                "selects the weights that matter most for what the model knows. Set harm_decay too, to 80 for instance"
            )
            warnings.warn(f"criterion {self.criterion!r} {text}, or the model forgets most", stacklevel=4)
        check_reference(self, self.reference or [])
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2**63), got {self.seed!r}")
        require_num_samples(self.num_samples)
        if not 0 < self.regret < 1:
            raise ValueError(f"regret must be a number in (0, 1), got {self.regret!r}")
        if self.score_memory is not None:
            score_bytes(self.score_memory)


def check_reference(config: SelectionSettings, reference: Sequence[Any]) -> None:
    """Raise ``ValueError`` for a reference that the config would ignore."""
    if reference and not config.needs_reference:
        names = ", ".join(repr(name) for name in CRITERIA if CRITERIA[name].reference)
        raise ValueError(
            f"criterion {config.criterion!r} uses no reference; remove it, set harm_decay, or use one of {names}"
        )


REFERENCES = (
    "Set reference='self' (text that the model writes itself), 'history' (earlier tasks) or a path of saved scores on "
    "the config, or pass reference=dataloader with general text to select_parameters (a trainer's selection_reference)"
)


def require_reference(config: SelectionSettings, reference: Any, remedy: str = REFERENCES) -> None:
    """Raise ``ValueError`` with the remedy if the config needs a reference and none is given."""
    if config.needs_reference and not reference:
        user = "harm_decay" if config.harm_decay else f"criterion {config.criterion!r}"
        raise ValueError(f"{user} weighs the task against a reference, but none was given. {remedy}")


def require_num_samples(value: Any) -> None:
    """Raise ``ValueError`` unless the value is a legal ``num_samples``."""
    if not (is_integer(value, 2) or value is None or value == "auto"):
        raise ValueError(f"num_samples must be an integer > 1, None (all) or 'auto', got {value!r}")


def score_bytes(value: int | str) -> int:
    """``score_memory`` in bytes; ``ValueError`` unless it is a number >= 0 or a size such as "8GiB"."""
    try:  # upper case, because accelerate reads "8gb" as bits
        text = value.replace(" ", "").upper() if isinstance(value, str) else value
        size = -1 if isinstance(value, bool) else convert_file_size_to_int(text)
    except (ValueError, AttributeError, TypeError):
        size = -1
    if size < 0:
        raise ValueError(f"score_memory must be a number of bytes or a size such as '8GiB', got {value!r}")
    return size

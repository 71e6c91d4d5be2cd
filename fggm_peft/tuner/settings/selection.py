"""What the config says of the selection: legal values, and what goes together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils.modeling import convert_file_size_to_int

from ...core.criteria import CRITERIA
from ...core.registry import require_one_of
from ...core.statistics import STATISTICS

if TYPE_CHECKING:
    from ..config import FGGMConfig


def require_criterion_settings(config: FGGMConfig) -> None:
    """Raise ``ValueError`` unless the criterion and what it looks at are legal; names become lists."""
    criterion = CRITERIA[config.criterion]
    if not criterion.supports(config.granularity):
        kind = "row" if criterion.weight_dim == 0 else "column"
        raise ValueError(
            f"criterion {config.criterion!r} requires granularity={kind!r}, got granularity='{config.granularity}'"
        )
    for name in ("history", "protect"):
        setattr(config, name, _names(name, getattr(config, name)))
    check_reference(config.criterion, _names("reference", config.reference) or [], config.history or [])
    require_protection(config.protection)
    for name in ("reference_texts", "reference_length"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 2:
            raise ValueError(f"{name} must be an integer > 1, got {value!r}")


def require_estimate_settings(config: FGGMConfig) -> None:
    """Raise ``ValueError`` unless scores can be estimated as the config says."""
    require_one_of("fisher_estimate", config.fisher_estimate, ("exact", "sketch"))
    if not isinstance(config.sketch_size, int) or isinstance(config.sketch_size, bool) or config.sketch_size < 1:
        raise ValueError(f"sketch_size must be an integer > 0, got {config.sketch_size!r}")
    if config.fisher_estimate == "exact":
        return
    if not config.granularity.is_slice:
        raise ValueError(
            "fisher_estimate='sketch' estimates sums over rows or columns and is not available for "
            f"granularity='{config.granularity}'; use fisher_estimate='exact'"
        )
    criterion = CRITERIA[config.criterion]
    if not any(STATISTICS[name].has_sketch for name in (*criterion.task, *criterion.reference)):
        raise ValueError(
            f"criterion {config.criterion!r} looks at no Fisher information, which fisher_estimate='sketch' is for"
        )


def check_reference(criterion: str, reference: Sequence[Any], history: Sequence[str]) -> None:
    """Raise ``ValueError`` for a reference, or names of earlier scores, that would not be looked at."""
    if reference and not CRITERIA[criterion].reference:
        names = ", ".join(repr(name) for name in CRITERIA if CRITERIA[name].reference)
        raise ValueError(f"criterion {criterion!r} looks at no reference; those that do are {names}")
    if history and not any(isinstance(source, str) and source == "history" for source in reference):
        raise ValueError("history= names scores that only reference='history' reads; give that too")


def require_reference(criterion: str, reference: Any) -> None:
    """Raise ``ValueError`` if the criterion needs a reference and there is none."""
    if CRITERIA[criterion].reference and not reference:
        raise ValueError(
            f"criterion {criterion!r} weighs the task against a reference, and none was given. Set reference='self' "
            "(text that the model writes itself), 'history' (earlier tasks) or a path of saved scores on the config, "
            "or pass reference=dataloader with general text to select_parameters (a trainer's selection_reference)"
        )


def _names(field_name: str, value: Any) -> list[str] | None:
    """A name or a list of names as a list."""
    names = [value] if isinstance(value, str) else value
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{field_name} must be a name or a path, or a list of them, got {value!r}")
    return list(names)


def require_num_samples(value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a legal ``num_samples``."""
    number = isinstance(value, int) and not isinstance(value, bool) and value > 1
    if not (number or value is None or value == "auto"):
        raise ValueError(f"num_samples must be an integer > 1, None (all) or 'auto', got {value!r}")


def size_in_bytes(value: int | str) -> int:
    """A number of bytes, or a size such as "8GiB", "8 gib" or "8GB"; ``ValueError`` if it is none."""
    # in upper case, since to accelerate "8gb" are bits
    return convert_file_size_to_int(value.replace(" ", "").upper() if isinstance(value, str) else value)


def score_bytes(value: int | str) -> int:
    """A ``score_memory`` in bytes.

    Raises:
        ValueError: it is neither a positive integer nor a size such as "8GiB".
    """
    try:
        size = -1 if isinstance(value, bool) else size_in_bytes(value)
    except (ValueError, AttributeError, TypeError):
        size = -1
    if size < 0:
        raise ValueError(f"score_memory must be a number of bytes or a size such as '8GiB', got {value!r}")
    return size


def require_protection(value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a legal ``protection``."""
    if not _is_finite(value) or not 0 <= value <= 1:
        raise ValueError(f"protection must be in [0, 1], got {value!r}")


def require_density(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a legal density."""
    if not _is_finite(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

"""Completes the model card that PEFT writes beside an adapter: how to load it, and what it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from .layout import grid_from_dict, markdown_table

if TYPE_CHECKING:
    from .config import FGGMConfig

_HEADING = "## How to Get Started with the Model"
_NEXT_HEADING = "\n## "
_MARK = "import fggm_peft"
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def complete_card(folder: Path, config: FGGMConfig) -> None:
    """Put working code and the selection's figures under PEFT's heading "How to Get Started".

    Does nothing where there is no card, or where the code is in it already (the author may have
    written the rest by hand).
    """
    path = folder / "README.md"
    if not path.exists():
        return
    card = ModelCard.load(path)
    if _MARK in card.text:
        return
    before, heading, after = card.text.partition(_HEADING)
    rest = _NEXT_HEADING + after.partition(_NEXT_HEADING)[2] if _NEXT_HEADING in after else ""
    card.text = f"{before}{heading or _HEADING}\n\n{_how_to_load(config)}\n{rest}"
    card.data.tags = sorted({*(card.data.tags or []), "fggm"})
    card.save(path)


def auto_class_name(config: FGGMConfig) -> str:
    """The class of transformers that loads the base of an adapter."""
    return _AUTO_CLASSES.get(str(config.task_type).removeprefix("TaskType."), "AutoModel")


def _how_to_load(config: FGGMConfig) -> str:
    base = config.base_model_name_or_path or "BASE_MODEL"
    auto_class = auto_class_name(config)
    return f"""\
```python
import fggm_peft  # registers the adapter type with PEFT
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "path or Hub id of this adapter")
```

{_description(config)}"""


def _description(config: FGGMConfig) -> str:
    policy = config.policy().to_dict()
    name = policy.pop("policy")
    arguments = ", ".join(f"{key} {value}" for key, value in policy.items())
    text = (
        "A sparse delta of the base model's weights by Fisher-Guided Gradient Masking "
        f"([arXiv 2601.18261](https://arxiv.org/abs/2601.18261)): {config.granularity}s chosen by the criterion "
        f"`{config.criterion}` with the threshold `{name}` ({arguments})."
    )
    found = config.selection or {}
    if {"samples", "agreement", "parameters", "density"} <= found.keys():
        agreement = "" if found["agreement"] is None else f", split-half agreement {found['agreement']:.2f}"
        text += (
            f" {found['parameters']:,} values, {found['density']:.2%} of the targeted weights, "
            f"from {found['samples']} samples{agreement}."
        )
    return text + _densities(found.get("densities")) + "\n"


def _densities(found: Any) -> str:
    """Where the values are, as a table: the Hub shows no picture that is not a file of its own."""
    grid = grid_from_dict(found)
    if grid is None:
        return ""
    if grid.is_even:
        return " The share is the same in every module."
    return f"\n\nShare of the weights that may differ from the base:\n\n{markdown_table(grid)}"

"""The model card beside an adapter: metadata for the Hub, how to load it, what it is and how it came about.

What the library writes stands between two marks under PEFT's heading "How to Get Started", and is replaced each time
that the adapter is saved; everything else is the author's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from ..module_paths import grid_from_dict, markdown_table
from ..settings.file import from_layer_groups

if TYPE_CHECKING:
    from ..config import FGGMConfig

_HEADING = "## How to Get Started with the Model"
_NEXT_HEADING = "\n## "
_BEGIN, _END = "<!-- written by fggm_peft; replaced when the adapter is saved -->", "<!-- end of fggm_peft's part -->"
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""PEFT's task type -> the class of transformers that loads the base of its adapters."""
_PAPER = "[arXiv 2601.18261](https://arxiv.org/abs/2601.18261)"


def complete_card(folder: Path, config: FGGMConfig) -> None:
    """Put working code and the adapter's figures into the model card of a folder, if there is one.

    One that says how to load it outside of our marks, as older versions wrote it or its author, is left alone.
    """
    path = folder / "README.md"
    if path.exists() and ((text := path.read_text()).count("import fggm_peft") == 0 or _BEGIN in text):
        write_card(folder, config)


def write_card(folder: Path, config: FGGMConfig) -> Path:
    """Write the model card of an adapter, or our part of it anew if there is one.

    Returns:
        The file.
    """
    path = folder / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    block = f"{_BEGIN}\n{_how_to_load(config)}\n{_description(config)}{_density_table(config)}{_END}"
    if _BEGIN in card.text and _END in card.text:
        before, _, rest = card.text.partition(_BEGIN)
        card.text = before + block + rest.partition(_END)[2]
    else:
        before, heading, after = card.text.partition(_HEADING)
        rest = _NEXT_HEADING + after.partition(_NEXT_HEADING)[2] if _NEXT_HEADING in after else ""
        card.text = f"{before}{heading or _HEADING}\n\n{block}\n{rest}"
    _complete_metadata_(card.data, config)
    card.save(path)
    return path


def _complete_metadata_(data: ModelCardData, config: FGGMConfig) -> None:
    """What the Hub looks at. A base in a folder has no name there, so it is left out."""
    data.library_name = "peft"
    base = config.base_model_name_or_path
    if base and not _is_path(base):
        data.base_model = base
    elif isinstance(data.base_model, str) and _is_path(data.base_model):
        data.base_model = None
    tags = {tag for tag in data.tags or [] if not _is_path(str(tag).removeprefix("base_model:adapter:"))}
    tags |= {"fggm", f"base_model:adapter:{data.base_model}"} if data.base_model else {"fggm"}
    data.tags = sorted(tags)
    data.license = data.license or "unknown"  # the author is asked for it in the text


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).is_dir()


def auto_class_name(config: FGGMConfig) -> str:
    """The class of transformers that loads the base of an adapter."""
    return AUTO_CLASSES.get(str(config.task_type).removeprefix("TaskType."), "AutoModel")


def _how_to_load(config: FGGMConfig) -> str:
    base = config.base_model_name_or_path or "BASE_MODEL"
    auto_class = auto_class_name(config)
    revision = f", revision={config.revision!r}" if config.revision else ""
    return f"""\
```python
import fggm_peft  # registers the adapter type with PEFT
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained({base!r}{revision})
model = PeftModel.from_pretrained(base, "path or Hub id of this adapter")
```
"""


def _description(config: FGGMConfig) -> str:
    policy = config.policy().to_dict()
    name = policy.pop("policy")
    arguments = ", ".join(f"{key} {value}" for key, value in policy.items())
    text = (
        f"A sparse delta of the base model's weights by Fisher-Guided Gradient Masking ({_PAPER}): "
        f"{config.granularity}s chosen by the criterion `{config.criterion}` with the threshold `{name}` ({arguments})."
    )
    found = config.selection or {}
    if {"samples", "agreement", "parameters", "density"} <= found.keys():
        agreement = "" if found["agreement"] is None else f", split-half agreement {found['agreement']:.2f}"
        text += (
            f" {found['parameters']:,} values, {found['density']:.2%} of the targeted weights, "
            f"from {found['samples']} samples{agreement}."
        )
    rounded = f", rounded to {config.delta_dtype}" if config.delta_dtype else ""
    text += f"\n\nStored are differences from the base{rounded}."
    if config.made_with:
        listed = ", ".join(f"{library} {version}" for library, version in sorted(config.made_with.items()))
        text += f" Saved with {listed}, peft {config.peft_version}."
    return text + " The license is that of its author, who has to put it into this card's header.\n\n"


def _density_table(config: FGGMConfig) -> str:
    """Where the values are: the Hub shows no picture that is not a file of its own."""
    grid = grid_from_dict((config.selection or {}).get("densities"))
    if grid is None:
        return _density_by_group(config)
    if grid.is_even:
        return "The share is the same in every module.\n\n"
    return f"Share of the weights that may differ from the base:\n\n{markdown_table(grid)}\n\n"


def _density_by_group(config: FGGMConfig) -> str:
    """Mean, least and greatest density of each group of layers, of an adapter whose selection says no more."""
    lines = ["| layers | modules | density | from | to |", "|---|---|---|---|---|"]
    for group, numbers in from_layer_groups(config.density_by_module or {}).items():
        values = list(numbers.values())
        mean = sum(values) / len(values)
        name = re.sub(r"\*", r"\\*", group)
        lines.append(f"| {name} | {len(values)} | {mean:.2%} | {min(values):.2%} | {max(values):.2%} |")
    return "\n".join([*lines, "", ""]) if config.density_by_module else ""

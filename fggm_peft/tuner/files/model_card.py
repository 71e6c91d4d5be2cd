"""The model card of an adapter: metadata for the Hub, how to load the adapter, and how it was made.

The library writes its text between two marks under PEFT's heading "How to Get Started", and replaces it whenever the
adapter is saved. Everything else belongs to the author.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from huggingface_hub import ModelCard, ModelCardData

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
"""PEFT's task type -> the class of transformers that loads the base of an adapter."""
_PAPER = "[arXiv 2601.18261](https://arxiv.org/abs/2601.18261)"


def complete_card(folder: Path, config: FGGMConfig) -> None:
    """Update the model card of a folder, if it has one.

    A card whose author explains outside of the marks how to load the adapter stays as it is.
    """
    path = folder / "README.md"
    if path.exists() and ("import fggm_peft" not in (text := path.read_text(encoding="utf-8")) or _BEGIN in text):
        write_card(folder, config)


def write_card(folder: Path, config: FGGMConfig) -> Path:
    """Write the model card of an adapter, or replace the library's part of an existing one; returns the file."""
    path = folder / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    block = f"{_BEGIN}\n{_how_to_load(config)}\n{_description(config)}\n\n{_END}"
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
    """Set the metadata that the Hub uses. A base in a local folder has no name on the Hub and is left out."""
    data.library_name = "peft"
    base = config.base_model_name_or_path
    if base and not _is_path(base):
        data.base_model = base
    elif isinstance(data.base_model, str) and _is_path(data.base_model):
        data.base_model = None
    tags = {tag for tag in data.tags or [] if not _is_path(str(tag).removeprefix("base_model:adapter:"))}
    tags |= {"fggm", f"base_model:adapter:{data.base_model}"} if data.base_model else {"fggm"}
    data.tags = sorted(tags)
    data.license = data.license or "unknown"  # the text asks the author to set it


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).is_dir()


def _how_to_load(config: FGGMConfig) -> str:
    base = config.base_model_name_or_path or "BASE_MODEL"
    saved_class = (config.auto_mapping or {}).get("base_model_class")  # PEFT saves it if there is no task type
    is_known = saved_class is not None and hasattr(transformers, saved_class)
    default = saved_class if is_known else "AutoModel"
    auto_class = AUTO_CLASSES.get(str(config.task_type).removeprefix("TaskType."), default)
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
    selection = config.selection or {}
    if made_by := selection.get("made_by"):
        text = f"A sparse delta of the base model's weights in units of {config.granularity.plural}. Made by {made_by}."
    else:
        policy = config.policy().to_dict()
        name = policy.pop("policy")
        arguments = ", ".join(f"{key} {value}" for key, value in policy.items())
        text = (
            f"A sparse delta of the base model's weights, trained with Fisher-Guided Gradient Masking ({_PAPER}). The "
            f"{config.granularity.plural} were selected by the criterion `{config.criterion}` with the threshold "
            f"`{name}` ({arguments})."
        )
    if {"parameters", "density"} <= selection.keys():
        text += f" It has {selection['parameters']:,} values, {selection['density']:.2%} of the targeted weights."
    if selection.get("samples"):
        regret = selection.get("regret")
        halves = "" if regret is None else f", with a regret of {regret:.1%}"
        text += f" The selection used {selection['samples']} samples{halves}."
    rounded = f", rounded to {config.delta_dtype}" if config.delta_dtype else ""
    text += f"\n\nThe file contains differences from the base{rounded}."
    if config.made_with:
        versions = ", ".join(f"{library} {version}" for library, version in sorted(config.made_with.items()))
        text += f" It was saved with {versions}, peft {config.peft_version}."
    return text + " The author must set the license in the header of this card."

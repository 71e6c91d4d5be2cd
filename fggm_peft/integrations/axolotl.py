"""A plugin that adds ``adapter: fggm`` to axolotl 0.21, through the interface ``axolotl.integrations.base``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, field_validator

from ..training.trainer import FGGMTrainerMixin
from ..training.trl import copy_to_reference_, restore_float32_
from ..tuner import FGGMConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

try:
    from axolotl.integrations.base import AdapterCapabilities, BasePlugin
except ImportError:  # tools that import every module of the package
    AdapterCapabilities = BasePlugin = object

NAME = "fggm"
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
INT8 = {"load_in_8bit": True}


class FGGMArgs(BaseModel):
    """The block ``fggm`` of axolotl's config: arguments of ``FGGMConfig``, checked when the YAML file is read."""

    fggm: dict[str, Any] | None = None

    @field_validator("fggm")
    @classmethod
    def _check(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            FGGMConfig(**options or {})
        except TypeError as error:  # an unknown option; pydantic reports only ValueErrors
            raise ValueError(str(error)) from error
        return options


class FGGMPlugin(BasePlugin):
    """Adds, selects and trains an FGGM adapter: ``plugins: [fggm_peft.integrations.axolotl.FGGMPlugin]``.

    ``load_in_4bit`` and ``load_in_8bit`` quantize the base model with bitsandbytes, as for axolotl's own adapters.
    ``lora_model_dir`` loads an FGGM adapter. Options ``lora_*`` of axolotl have no effect.
    """

    def register(self, cfg: Any) -> None:
        """Quantize the base model. axolotl does so for its own adapters only."""
        quantization = NF4 if cfg.get("load_in_4bit") else INT8 if cfg.get("load_in_8bit") else None
        if cfg.get("adapter") != NAME or quantization is None:
            return
        options = {"quant_method": "bitsandbytes", **quantization, **(cfg.get("bnb_config_kwargs") or {})}
        loading = cfg.get("overrides_of_model_kwargs") or {}
        cfg["overrides_of_model_kwargs"] = {"quantization_config": options, **loading}

    def get_input_args(self) -> str:
        """The class that describes the block ``fggm``."""
        return f"{FGGMArgs.__module__}.{FGGMArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """One adapter, which is not a variant of LoRA."""
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """The model with an adapter, and its config. With ``config_only``, the trainer adds the adapter (DPO, KTO)."""
        if cfg.adapter != NAME:
            return None
        if cfg.lora_model_dir and not config_only:
            loaded = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return loaded, loaded.peft_config["default"]
        options = cfg.fggm.to_dict() if cfg.fggm else {}
        config = FGGMConfig(**{"task_type": "CAUSAL_LM", **options})
        return (None if config_only else get_peft_model(model, config)), config

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Add ``FGGMTrainerMixin`` to the trainer, which selects before the first step."""
        if cfg.adapter != NAME:
            return
        kind = type(trainer)
        trainer.__class__ = type(kind.__name__, (FGGMTrainerMixin, kind), {})
        restore_float32_(trainer.model)
        copy_to_reference_(trainer.model)

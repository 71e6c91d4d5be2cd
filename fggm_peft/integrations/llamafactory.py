"""FGGM in the v1 trainer of LLaMA-Factory 0.9.5, which has a registry of PEFT methods.

Start it with ``python -m fggm_peft.integrations.llamafactory config.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model
from torch import Tensor

from ..retention import attach_harm_decay
from ..selection import select_parameters
from ..selection.select import active_adapter
from ..training.checkpoints import unselected_adapters
from ..training.texts import with_texts
from ..tuner import FGGMConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "fggm"


def adapted_model(model: PreTrainedModel, config: Mapping[str, Any], is_train: bool = False) -> PeftModel:
    """The plugin of ``peft_config: {name: fggm, ...}``: adds an adapter, or loads ``adapter_name_or_path``.

    The other fields are arguments of ``FGGMConfig``.
    """
    if path := config.get("adapter_name_or_path"):
        return PeftModel.from_pretrained(model, path, is_trainable=is_train)
    options = {name: value for name, value in config.items() if name != "name"}
    return get_peft_model(model, FGGMConfig(**{"task_type": "CAUSAL_LM", **options}))


class SelectingTrainerMixin:
    """Adds selection on the training data, before the model is sharded, and harm decay to a ``BaseTrainer``."""

    model: Any
    optimizer: Any
    renderer: Any
    train_batch_generator: Any

    def _shard_model(self) -> None:
        if unselected_adapters(self.model):
            _, config = active_adapter(self.model, None)
            reference = with_texts(config.reference, self.renderer.processor)
            select_parameters(self.model, _Batches(self.train_batch_generator), reference=reference)
        super()._shard_model()  # type: ignore[misc]

    def _init_optimizer(self) -> None:
        super()._init_optimizer()  # type: ignore[misc]
        attach_harm_decay(self.model, self.optimizer)


class _Batches:
    """The micro-batches of LLaMA-Factory's generator, which may be read several times."""

    def __init__(self, generator: Any):
        self.generator = generator

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in self.generator:
            for batch in step:
                yield {
                    key: value for key, value in batch.items() if isinstance(value, Tensor) and key != "loss_weights"
                }


def main() -> None:
    """Train like ``llamafactory-cli sft``, with the same arguments."""
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin
    from llamafactory.v1.trainers import sft_trainer

    PeftPlugin(NAME).register()(adapted_model)
    sft_trainer.SFTTrainer = type("SFTTrainer", (SelectingTrainerMixin, sft_trainer.SFTTrainer), {})
    sft_trainer.run_sft()


if __name__ == "__main__":
    main()

"""CorDA in its knowledge-preserving mode: a LoRA that starts in what general text uses least."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from ...selection import linear_layers
from ...selection.frozen_model import frozen_in_eval_mode
from ...selection.reference import is_text_file
from ...training.texts import text_batches
from .method import METHODS
from .peft_method import PeftMethod


@METHODS.register("corda")
@dataclass
class CorDA(PeftMethod):
    """CorDA in the knowledge-preserving mode (arXiv 2406.05223, section 3), as implemented in PEFT.

    With the covariance C of a layer's inputs on the reference, ``W C`` is decomposed by singular values. The adapter
    starts as the part of W of the smallest ones, and the rest of W is frozen. The decomposition is computed for every
    task, on the model before it. The saved delta is an ordinary LoRA of twice the rank, for the unchanged weight.

    Args:
        reference: one or several text files (.txt); at most ``num_samples`` paragraphs of each are read.
    """

    config_class = LoraConfig
    harm_decay: float = field(default=0.0, init=False, repr=False)  # the adapter does not start at zero
    num_samples: int = 256
    _start: TemporaryDirectory | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(map(is_text_file, self.reference)):
            raise ValueError(f"reference of {self.name!r} must be text files (.txt), got {self.reference!r}")

    @property
    def uses_reference(self) -> bool:
        return True

    def defaults(self):
        corda = CordaConfig(corda_method="kpm")
        return {**super().defaults(), "init_lora_weights": "corda", "corda_config": corda}

    def covariance(self, trainer):
        return None  # PEFT computes its own

    def begin_task(self, model, examples):
        return model  # the trainer has the tokenizer for the reference

    def trainer(self, **arguments):
        model = arguments["model"].to(arguments["args"].device)
        config = self.make_config()
        if config.target_modules == "all-linear":  # which preprocess_corda does not know
            config.target_modules = list(linear_layers(model))
        with frozen_in_eval_mode(model):
            preprocess_corda(model, config, lambda: self._read(model, arguments["data_collator"].tokenizer))
        arguments["model"] = adapted = self.wrap(model, config)
        # otherwise loading the start would subtract it from the weights again
        config.init_lora_weights, config.corda_config = True, None
        self._start = TemporaryDirectory()
        self.save(adapted, None, Path(self._start.name, "start"))
        return super().trainer(**arguments)

    def _read(self, model, tokenizer) -> None:
        for file in self.reference:
            # one at a time, because padding would count
            for batch in islice(text_batches(file, tokenizer, batch_size=1), self.num_samples):
                model(input_ids=batch["input_ids"].to(model.device))

    def end_task(self, model, trainer, folder):
        assert self._start is not None
        start = str(Path(self._start.name, "start"))
        self.save(trainer.model, trainer, folder, path_initial_model_for_weight_conversion=start)
        self._start.cleanup()
        return trainer.model.merge_and_unload()

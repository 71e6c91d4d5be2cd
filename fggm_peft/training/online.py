"""Online selection within a trainer: the first steps measure, the others train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import TrainerCallback

from ..selection.online import online_selection
from ..selection.select import active_adapter
from .checkpoints import unselected_adapters
from .texts import reference_of

if TYPE_CHECKING:
    from .trainer import FGGMTrainerMixin


def require_share(value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a legal share of the steps, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value < 1):
        raise ValueError(f"online_selection is the share of the steps that measure, in (0, 1), or None; got {value!r}")


class OnlineWindow(TrainerCallback):
    """Measures over the first ``trainer.online_selection`` of all steps, then fixes the support.

    The optimizer has the values from the start, of no size until then. No checkpoint is written meanwhile, so that a
    run which is stopped there begins again.

    Args:
        trainer: has the mixin.
    """

    def __init__(self, trainer: FGGMTrainerMixin):
        self.trainer = trainer
        self.selection: online_selection | None = None
        self.last_step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.abandon()
        share, model = self.trainer.online_selection, cast(nn.Module, self.trainer.model)
        if share is None or not (names := unselected_adapters(model)):
            return
        self._require_possible(args, names)
        self.last_step = state.global_step + max(1, round(share * (state.max_steps - state.global_step)))
        _, config = active_adapter(model, names[0])
        reference = reference_of(self.trainer.selection_reference, config, self.trainer.texts_tokenizer)
        self.selection = online_selection(model, adapter_name=names[0], reference=reference).__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if self.selection is None:
            return
        if state.global_step >= self.last_step:
            should_log = control.should_log
            self._finish()
            control.should_log = should_log  # what is logged of the selection counts as the step's log
        else:
            control.should_save = False

    def on_train_end(self, args, state, control, **kwargs):
        if self.selection is not None:  # stopped before its time
            self._finish()

    def abandon(self) -> None:
        """Leave the model as it was, if the window is open."""
        if self.selection is not None and self.selection.is_open:
            self.selection.abandon()
        self.selection = None

    def _finish(self) -> None:
        selection, self.selection = self.selection, None
        assert selection is not None
        with self.trainer.accelerator.autocast():
            self.trainer.report_selection(selection.finish())

    def _require_possible(self, args: Any, names: list[str]) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                "the trainer selects online in one process only, since it wraps the model for several before there are "
                "values to train. Leave online_selection out: several processes select before training."
            )
        if self.trainer.accelerator.scaler is not None:
            raise ValueError("float16's loss scaling fails on steps that only measure; train in bfloat16 or float32")
        if self.trainer.selection_log_likelihood is not None:
            raise ValueError("online selection measures the training loss: it takes no selection_log_likelihood")
        if len(names) > 1:
            raise ValueError(f"online selection is for one adapter at a time, and {', '.join(names)} have no support")

"""``log p(y | x)`` of each sample, summed over its answer's tokens. The selection pass differentiates it.

There is one short function for each kind of head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..tuner.support import unwrapped

IGNORED = -100
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "EncoderDecoderModel")
_SPAN = ("start_positions", "end_positions")

LogLikelihood = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""(model, batch) -> ``[b]``, the summed log-likelihood of each sample, differentiable."""


def default_log_likelihood(model: nn.Module, task_type: str | None) -> LogLikelihood:
    """The log-likelihood that fits the model's head.

    Args:
        model: if ``task_type`` is None, the name of its class decides.
        task_type: PEFT's ``TaskType``.

    Raises:
        ValueError: the head is unknown; the message says what to pass instead.
    """
    head = _HEADS.get(task_type or task_type_of(model) or "")
    if head is None:
        raise ValueError(
            f"the likelihood of a {type(model).__name__} is unknown (task_type={task_type!r}). Set task_type on the "
            "FGGMConfig (CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS or QUESTION_ANS), or pass log_likelihood=: a "
            "function of (model, batch) that returns the summed log-likelihood of each sample."
        )

    def log_likelihood(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        labels = _span(batch) if head is _question_answering else batch.get("labels")
        if not isinstance(labels, Tensor):
            raise ValueError(
                "a batch has no labels, and the selection pass needs them. For another loss, pass "
                "log_likelihood= (a trainer's selection_log_likelihood)"
            )
        return head(model, batch, labels)

    return log_likelihood


def task_type_of(model: nn.Module) -> str | None:
    """PEFT's ``TaskType`` of a transformers model, from the name of its class."""
    names = {
        TaskType.SEQ_2_SEQ_LM if is_encoder_decoder(model) else TaskType.CAUSAL_LM: _GENERATING,
        TaskType.SEQ_CLS: ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification"),
        TaskType.TOKEN_CLS: ("ForTokenClassification", "ForMaskedLM"),
        TaskType.QUESTION_ANS: ("ForQuestionAnswering",),
    }
    name = type(model).__name__
    return next((task_type for task_type, parts in names.items() if any(part in name for part in parts)), None)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether labels belong to a decoder that has inputs of its own; names of classes do not tell."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _logits(model: nn.Module, batch: Mapping[str, Any], **extra: Any) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key not in ("labels", *_SPAN)}
    output = model(**inputs, **extra)
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], 1)


def _causal(model, batch, labels):
    labels = labels[:, 1:]
    # the prompt has no loss, and the head is the widest layer of a small model
    positions = (labels != IGNORED).any(0).nonzero()[:, 0].cpu()
    if not len(positions) or "logits_to_keep" in batch or not (takes_positions(model) and has_plain_head(model)):
        return _token_sum(_logits(model, batch)[:, :-1], labels)
    logits = _logits(model, batch, logits_to_keep=positions)
    if logits.shape[1] > len(positions):  # unsloth's models ignore positions
        logits = logits[:, positions]
    return _token_sum(logits, labels[:, positions])


def takes_positions(model: nn.Module) -> bool:
    """Whether the model can compute the logits of only some positions."""
    inner: Any = unwrapped(model)
    if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        return False
    # accelerate would move the positions to the first device, and the states that they index are on the last
    return len(set(getattr(inner, "hf_device_map", {}).values()) - {"cpu", "disk"}) <= 1


def has_plain_head(model: nn.Module) -> bool:
    """Whether the output head is not adapted."""
    inner: Any = unwrapped(model)
    return not isinstance(inner.get_output_embeddings(), BaseTunerLayer)


def _sequence_to_sequence(model, batch, labels):
    extra = {}
    if batch.get("decoder_input_ids") is None and batch.get("decoder_inputs_embeds") is None:
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        copy = labels.clone()  # FSMT overwrites it
        # without the method, the model's own forward shifts the labels, at the cost of a loss that is not used
        extra = {"labels": copy} if shift is None else {"decoder_input_ids": shift(labels=copy)}
    return _token_sum(_logits(model, batch, **extra), labels)


def _token_classification(model, batch, labels):
    return _token_sum(_logits(model, batch), labels)


def _question_answering(model, batch, labels):
    """The first and the last position of the answer are two tokens ``[b, 2]``, whose classes are the positions."""
    logits = _logits(model, batch)
    outside = (labels < 0) | (labels >= logits.shape[-1])  # as in transformers, these do not count
    return _token_sum(logits, labels.masked_fill(outside, IGNORED))


def _span(batch: Mapping[str, Any]) -> Tensor | None:
    positions = [batch[name].reshape(-1) for name in _SPAN if isinstance(batch.get(name), Tensor)]
    return torch.stack(positions, 1) if len(positions) == 2 else None


def _token_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-likelihood ``[b]`` of the answers' tokens from logits ``[b, t, v]``; only their rows become float32."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels are {list(labels.shape)}, the logits' tokens are {list(logits.shape[:2])}")
    answer = labels != IGNORED
    if not answer.any():
        return logits[..., 0].float().sum(1) * 0  # no answer: DataPass raises if this is so in all batches
    rows = (logits.flatten(0, 1) if answer.all() else logits[answer]).float()  # no copy if every token counts
    tokens = -F.cross_entropy(rows, _checked(labels[answer], rows), reduction="none")
    sample = answer.nonzero()[:, 0]
    return tokens.new_zeros(len(labels)).index_add(0, sample, tokens)


def _sequence_classification(model, batch, labels):
    logits = _logits(model, batch).float()
    problem = _problem_type(model, logits, labels)
    if labels.numel() != (len(logits) if problem == "single_label_classification" else logits.numel()):
        raise ValueError(f"{problem}: labels are {list(labels.shape)}, but the logits are {list(logits.shape)}")
    if problem == "single_label_classification":
        return -F.cross_entropy(logits, _checked(labels.reshape(-1), logits), reduction="none")
    labels = labels.reshape(logits.shape).float()
    if problem == "regression":  # a normal density of unit variance
        return -0.5 * (logits - labels).square().sum(1)
    return -F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)


def _problem_type(model: nn.Module, logits: Tensor, labels: Tensor) -> str:
    """The ``problem_type`` of transformers' loss for sequence classification: of the config, else from the labels."""
    config = getattr(unwrapped(getattr(model, "module", model)), "config", None)
    if problem := getattr(config, "problem_type", None):
        return problem
    if logits.shape[-1] == 1:
        return "regression"
    single = labels.numel() == len(labels) and not labels.is_floating_point()
    return "single_label_classification" if single else "multi_label_classification"


def _checked(labels: Tensor, logits: Tensor) -> Tensor:
    """The labels ``[n]``. An index error in a device's kernel would come late and without a message.

    Raises:
        ValueError: a label is not a class of the logits ``[n, c]``.
    """
    classes = logits.shape[-1]
    wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= classes)]
    if len(wrong):
        raise ValueError(
            f"a label is {int(wrong[0])}, but the model's head has the classes 0..{classes - 1}. Check that the labels "
            f"come from the same tokenizer or label list; {IGNORED} marks tokens outside the answer."
        )
    return labels.long()


_HEADS: dict[str, Callable[..., Tensor]] = {
    TaskType.CAUSAL_LM: _causal,
    TaskType.SEQ_2_SEQ_LM: _sequence_to_sequence,
    TaskType.SEQ_CLS: _sequence_classification,
    TaskType.TOKEN_CLS: _token_classification,
    TaskType.QUESTION_ANS: _question_answering,
}

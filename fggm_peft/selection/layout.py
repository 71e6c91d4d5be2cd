"""Where the samples and the positions of a batch are in what a layer receives.

Most layers receive ``[samples, positions, features]``. Others receive the positions first, both as one dimension, or
something else, such as the images of all samples or the tokens of an expert. Equal numbers make these shapes look
alike, so shapes do not decide. The first batch is compared with its first and its last sample alone, and the first
sample with itself without its last position.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..tuner.layer_types import FGGMConv
from .likelihood import IGNORED, is_encoder_decoder
from .rounds import Round, is_divisible, samples_of

Axis = Callable[[Tensor, int], Tensor]
"""Returns what a layer received with the samples in the first dimension."""
AXES: tuple[Axis, ...] = (
    lambda x, samples: x,
    lambda x, samples: x.transpose(0, 1),
    lambda x, samples: x.unflatten(0, (samples, -1)),
    lambda x, samples: x.unflatten(0, (-1, samples)).transpose(0, 1),
)
Axes = Mapping[str, Axis | None]
Calls = Mapping[str, list[Tensor]]
"""Module path -> the inputs of its calls."""

_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids", "labels")
_DECODER = ("labels", "decoder_")
"""Starts of the names of an encoder-decoder's inputs that have one entry for each position of the decoder."""
_TOLERANCE = 0.1  # batches of other sizes round differently; another sample differs by about its size
_FEATURES = 8  # of each position that are compared


@dataclass(frozen=True)
class Layout:
    """The layout of one batch.

    Args:
        samples: number of samples.
        axes: module path -> axis; None if the batch cannot be divided, so that only shapes are known.
        streams: module path -> key of ``paddings``.
        paddings: masks ``[b, t]``, True where a position is padding.
        tokens: the shapes ``[b, t]`` of the batch's own tensors.
    """

    samples: int
    axes: Axes | None = field(default_factory=dict)
    streams: Mapping[str, str] = field(default_factory=dict)
    paddings: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: frozenset[tuple[int, ...]] = frozenset()

    def by_sample(self, path: str, x: Tensor) -> Tensor:
        """What a layer received or returned, with the samples first; with one sample, everything belongs to it.

        Raises:
            ValueError: it cannot be split into samples.
        """
        if self.samples == 1:
            return x
        if self.axes is None:
            is_tokens = x.dim() > 2 and tuple(x.shape[:2]) in self.tokens and x.shape[1] != self.samples
            result = x if is_tokens else None
        else:
            result = self._split(path, x)
        if result is None:
            raise ValueError(
                f"module {path} was called with the shape {list(x.shape)} in a batch of {self.samples} samples, so its "
                "gradient cannot be split into samples. Use a dataloader with batch size 1, or exclude_modules."
            )
        return result

    def padding(self, path: str, x: Tensor) -> Tensor | None:
        """The padded positions of ``x`` ``[b, t, ...]``, or None."""
        padding = self.paddings.get(self.streams.get(path, ""))
        return None if padding is None or padding.shape != x.shape[:2] else padding.to(x.device)

    def positions(self, path: str, x: Tensor) -> Tensor:
        """The positions of a linear layer's input that are no padding, ``[n, i]``; samples need not be known."""
        has_axis = (self.axes or {}).get(path) is not None
        split = self._split(path, x) if has_axis else x
        if split is None or self.samples == 1:
            split = x.reshape(1, -1, x.shape[-1])
        padding = self.padding(path, split)
        return split.reshape(-1, x.shape[-1]) if padding is None else split[~padding]

    def _split(self, path: str, x: Tensor) -> Tensor | None:
        axis = (self.axes or {}).get(path)
        return None if axis is None else _along(axis, x, self.samples)


class Layouts:
    """The layouts of batches. Each kind of batch is measured once.

    Args:
        layers: the layers by module path.
        run: runs the model on a batch; None if it must not run, so that only shapes are known.
        model: the base model.
        one_by_one: True: always divide batches into samples. False: only if a layer requires it. None: never, because
            a sample may depend on the others.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        run: Callable[[Mapping], Any] | None,
        model: nn.Module,
        one_by_one: bool | None = False,
    ):
        self.layers, self.run, self.one_by_one = layers, run, one_by_one
        self.config = getattr(model, "config", None)
        self.has_decoder = is_encoder_decoder(model)
        self._known: dict[Any, tuple[Axes | None, Mapping[str, str]]] = {}

    def parts(self, round: Round) -> Iterator[tuple[Round, Layout]]:
        """The batch of a round, or its samples if a layer receives something that only a single sample explains."""
        if round.batch is None:
            return
        is_whole = not is_divisible(round.batch, round.rows, self.config)
        key = frozenset(round.batch), is_whole, round.rows > 1
        if key not in self._known:
            self._known[key] = self._measured(round.batch, round.rows, is_whole)
        axes, streams = self._known[key]
        one_by_one = self.one_by_one
        if one_by_one is False:
            one_by_one = axes is not None and None in axes.values()
        for part in round.divided(self.config) if one_by_one else [round]:
            assert part.batch is not None
            paddings = {name: padding for name, padding in self._paddings(part.batch).items() if padding.any()}
            tokens = frozenset(tuple(t.shape[:2]) for name in _TOKENS if isinstance(t := part.batch.get(name), Tensor))
            yield part, Layout(part.rows, axes, streams, paddings, tokens)

    def _measured(
        self, batch: Mapping[str, Any], samples: int, is_whole: bool
    ) -> tuple[Axes | None, Mapping[str, str]]:
        """The axes and the streams."""
        whole = self._received(batch)
        if samples == 1 or is_whole:
            return (None if is_whole else {}), self._streams(batch, whole)
        first_sample, last_sample = samples_of(batch, 0, 1), samples_of(batch, samples - 1, samples)
        first, last = self._received(first_sample), self._received(last_sample)
        if whole is None or first is None or last is None:
            return None, self._streams(batch, whole)
        axes = {}
        for path, calls in whole.items():
            alone = {0: first.get(path, []), samples - 1: last.get(path, [])}
            # the dimensions after the first have other meanings in a convolution
            possible = AXES[:1] if isinstance(self.layers[path], FGGMConv) else AXES
            axes[path] = _axis(possible, calls, alone, samples, compares_content=True)
            if axes[path] is None and self.one_by_one is None:
                axes[path] = _axis(possible[:2], calls, alone, samples, compares_content=False)
        return axes, self._streams(first_sample, first)

    def _streams(self, batch: Mapping[str, Any], before: Calls | None) -> dict[str, str]:
        """Module path -> the stream whose positions it receives: those that change if the stream loses its last.

        ``before`` is what the layers receive from the batch.
        """
        streams = dict.fromkeys(self.layers, "input")
        for name, padding in self._paddings(batch).items() if before else ():
            cut = dict(batch)
            for key, value in batch.items():
                is_in = not self.has_decoder or key.startswith(_DECODER) == (name == "decoder")
                if is_in and isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == padding.shape[1]:
                    cut[key] = value[:, :-1]
            after = self._received(cut)
            if after is None:  # a length that the model does not support
                continue
            for path, calls in (before or {}).items():
                if [x.shape for x in calls] != [x.shape for x in after.get(path, [])]:
                    streams[path] = name
                elif streams[path] == name:
                    streams[path] = ""
        return streams

    def _paddings(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The padded positions of each stream of tokens."""
        masks = {"input": batch.get("attention_mask")}
        if self.has_decoder:
            masks["decoder"] = batch.get("decoder_attention_mask")
        paddings = {name: mask == 0 for name, mask in masks.items() if isinstance(mask, Tensor) and mask.dim() == 2}
        labels = batch.get("labels")
        if self.has_decoder and "decoder" not in paddings and isinstance(labels, Tensor) and labels.dim() == 2:
            paddings["decoder"] = labels == IGNORED
        return paddings

    def _received(self, batch: Mapping[str, Any]) -> Calls | None:
        """The inputs of each call of each layer, with a few features of each position; None if the model cannot run."""
        if self.run is None:
            return None
        received: dict[str, list[Tensor]] = defaultdict(list)

        def record(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            received[path].append(x[..., :_FEATURES].clone() if x.is_floating_point() else x)

        handles = [m.register_forward_pre_hook(partial(record, p), with_kwargs=True) for p, m in self.layers.items()]
        try:
            with torch.no_grad():
                self.run(batch)
        except (RuntimeError, ValueError, IndexError):  # if it matters, the pass itself raises it
            return None
        finally:
            for handle in handles:
                handle.remove()
        return received


def _axis(
    axes: Sequence[Axis],
    whole: list[Tensor],
    alone: Mapping[int, list[Tensor]],
    samples: int,
    compares_content: bool,
) -> Axis | None:
    """The axis along which all calls with a batch consist of the calls with single samples; None if no axis fits.

    ``alone`` maps the position of a sample in the batch to its own calls.
    """
    if any(len(calls) != len(whole) for calls in alone.values()):
        return None

    def fits(axis: Axis, position: int, x: Tensor, y: Tensor) -> bool:
        split, own = _along(axis, x, samples), _along(axis, y, 1)
        if split is None or own is None or split.shape[1:] != own.shape[1:]:
            return False
        return not compares_content or _is_close(split[position], own[0])

    calls = [(position, x, y) for position, own in alone.items() for x, y in zip(whole, own, strict=True)]
    return next((axis for axis in axes if all(fits(axis, *call) for call in calls)), None)


def _along(axis: Axis, x: Tensor, samples: int) -> Tensor | None:
    try:
        result = axis(x, samples)
    except (RuntimeError, IndexError):
        return None
    return result if len(result) == samples else None


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape differ by rounding only."""
    a, b = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
    return float((a - b).norm()) <= _TOLERANCE * float(b.norm())

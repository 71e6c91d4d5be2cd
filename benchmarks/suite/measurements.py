"""The measurements of the methods at one setting. A measurement is one entry.

An entry takes a setting and a number of seconds, and returns tables (``timing``): name -> method -> figures.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import selection as fisher
import torch
from common import batches, clock, peak_mib
from peers import LOOP, peers
from peft import PeftModel
from torch import nn

from fggm_peft import HarmDecay, InputCovariance, input_covariance
from fggm_peft.core.index_codec import entropy_bytes
from fggm_peft.retention.harm_decay import EVERY

from .bases import make_base, sharing_weights
from .cases import Case, Setting
from .methods import (
    ADAPTERS,
    CANNOT_UNMERGE,
    COLUMNS,
    CONTIGUOUS,
    ELEMENTS,
    FGGM,
    FROZEN,
    METHODS,
    WEIGHT_GRADIENTS,
    held_mib,
    methods_for,
    randomize_,
    spread,
    targeted_values,
    targets,
    trainable,
)
from .timing import Table, add_ratios_, timed, working

FILE = "adapter_model.safetensors"


def base_of(setting: Setting) -> nn.Module:
    return make_base(setting.hidden, setting.layers, setting.vocabulary, setting.base)


def batch_of(setting: Setting) -> dict[str, torch.Tensor]:
    return batches(1, setting.batch, setting.length, setting.vocabulary)[0]


# Training step ----------------------------------------------------------------------------------


class Step:
    """Forward, backward and AdamW step of a model on one batch."""

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor], checkpointing: bool = False):
        self.model, self.batch = model.train(), batch
        if checkpointing:
            model.gradient_checkpointing_enable()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None
        if self.optimizer is None:  # backward to the output of the embeddings, which every method requires
            model.get_input_embeddings().register_forward_hook(lambda m, a, output: output.detach().requires_grad_())

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def training_step(setting: Setting, seconds: float) -> dict[str, Table]:
    """A step of each method, and its memory: model and optimizer before the step, plus the peak of its allocations."""
    base, batch = base_of(setting), batch_of(setting)
    values = round(targeted_values(base) * setting.density)
    names = methods_for(setting.base, setting.parameters)

    def build(name: str) -> Step:
        step = Step(METHODS[name](base, values), batch, setting.checkpointing)
        step()
        return step

    steps, failed = working(names, build)
    table = timed(dict(steps), FROZEN, seconds) | {"failed": failed}
    for name, step in steps.items():
        held = held_mib(step.model, step.optimizer)
        allocated = peak_mib(step)
        figures = {"trainable": trainable(step.model), "held_mib": held, "peak_mib": held + allocated}
        table["rows"][name] |= figures
    add_ratios_(table, "peak_mib")
    return {"training step": table}


# Decoding ---------------------------------------------------------------------------------------


def decoding(setting: Setting, seconds: float) -> dict[str, Table]:
    """The next token of each sample, with unmerged adapters and without a context, which costs all methods the same."""
    base, tokens = base_of(setting), batch_of(setting)["input_ids"][:, :1]
    values = round(targeted_values(base) * setting.density)
    names = [name for name in methods_for(setting.base, setting.parameters) if name in (FROZEN, *ADAPTERS)]

    def build(name: str) -> Callable[[], Any]:
        model = METHODS[name](base, values).eval()
        model(tokens)
        return functools.partial(model, tokens)

    with torch.no_grad():
        calls, failed = working(names, build)
        return {"decoding": timed(calls, FROZEN, seconds) | {"failed": failed}}


# Selection pass ---------------------------------------------------------------------------------


def selection_pass(setting: Setting, seconds: float) -> dict[str, Table]:
    """A Fisher pass of each kind over one batch, and other libraries for per-sample gradients."""
    model, batch = base_of(setting), batch_of(setting)
    ours = fisher.selections(model, batch)
    calls = {FROZEN: functools.partial(fisher.frozen_pass, sharing_weights(model), batch), **ours}
    if setting.is_dense:
        calls[WEIGHT_GRADIENTS] = functools.partial(fisher.pass_with_weight_gradients, sharing_weights(model), batch)
    table = timed(dict(calls), FROZEN, seconds)
    if setting.peers:
        others = {name: functools.partial(run, batch) for name, run in peers(model).items()}
        table["rows"] |= timed({FROZEN: calls[FROZEN], **others}, FROZEN, seconds)["rows"]
        calls |= others
    for name, call in calls.items():
        table["rows"][name]["peak_mib"] = peak_mib(call)
    if setting.peers:  # the loop has one sample in memory, so it is compared with a pass over one sample
        first = {name: tensor[:1] for name, tensor in batch.items()}
        alone = fisher.Selection(model, first, granularity="row")
        table["rows"][LOOP]["ours_mib"] = peak_mib(alone)
    add_ratios_(table, "peak_mib")
    return {"selection pass": table}


# Harm decay -------------------------------------------------------------------------------------

NO_DECAY, FORWARD = "without harm decay", "64 forward passes"
PARAGRAPHS = 32


class DecayedSteps:
    """As many optimizer steps as between two decays, on one batch.

    Args:
        every: steps between two decays; None trains without harm decay.
    """

    def __init__(self, base: nn.Module, values: int, batch: dict, covariance: InputCovariance, every: int | None):
        self.step = Step(METHODS[COLUMNS](base, values), batch)
        if every is not None:
            HarmDecay(covariance, every=every).attach(self.step.model, self.step.optimizer)

    def __call__(self) -> None:
        for _ in range(EVERY):
            self.step()


def harm_decay(setting: Setting, seconds: float) -> dict[str, Table]:
    """Steps of columns with harm decay, its statistics, and the selection by gain under decay."""
    base, batch = base_of(setting), batch_of(setting)
    values = round(targeted_values(base) * setting.density)
    paragraphs = batches(PARAGRAPHS, 1, setting.length, setting.vocabulary)
    covariance = input_covariance(base, paragraphs, progress=False)

    intervals = {NO_DECAY: None, "harm decay": EVERY, "harm decay, every step": 1}
    steps = {name: DecayedSteps(base, values, batch, covariance, every) for name, every in intervals.items()}
    tables = {"step with harm decay": timed(dict(steps), NO_DECAY, seconds)}

    def two_passes() -> None:
        with torch.no_grad():
            for paragraph in paragraphs * 2:
                base(**paragraph)

    def statistics() -> None:
        input_covariance(base, paragraphs, progress=False)

    table = timed({FORWARD: two_passes, "statistics": statistics}, FORWARD, seconds)
    table["rows"]["statistics"]["share_of_base"] = covariance.nbytes / base.get_memory_footprint()
    tables["statistics of harm decay"] = table

    selections = {
        "frozen": functools.partial(fisher.frozen_pass, sharing_weights(base), batch),
        "rows, Fisher": fisher.Selection(base, batch, granularity="row"),
        "rows, gain under decay": fisher.Selection(base, batch, covariance=covariance, granularity="row"),
        "columns, gain under decay": fisher.Selection(base, batch, covariance=covariance, granularity="column"),
    }
    return tables | {"selection under decay": timed(selections, "frozen", seconds)}


# Adapter files and merging ----------------------------------------------------------------------


class Adapter:
    """An adapter of a method with random values, saved in a folder and loaded on a separate base."""

    def __init__(self, method: str, base: nn.Module, values: int, folder: Path):
        self.method, self.folder = method, folder / method
        self.base = base
        self.own = METHODS[method](base, values)
        randomize_(self.own)
        self.values = trainable(self.own)
        self.save()
        # merging changes the weights, which the others share
        self.merged = PeftModel.from_pretrained(_own_weights(base), self.folder)
        self.merged.load_adapter(self.folder, "other")

    def save(self) -> None:
        self.own.save_pretrained(self.folder, save_embedding_layers=False)

    def load(self) -> float:
        base = sharing_weights(self.base)
        start = clock()
        PeftModel.from_pretrained(base, self.folder)
        return clock() - start

    def merge(self) -> float:
        start = clock()
        self.merged.merge_adapter()
        seconds = clock() - start
        self.merged.unmerge_adapter()
        return seconds

    def merge_and_unmerge(self) -> None:
        self.merged.merge_adapter()
        self.merged.unmerge_adapter()

    def switch(self) -> float:
        """Replace one merged delta by another."""
        self.merged.merge_adapter(["default"])
        start = clock()
        self.merged.unmerge_adapter()
        self.merged.merge_adapter(["other"])
        seconds = clock() - start
        self.merged.unmerge_adapter()
        return seconds

    def bytes(self) -> int:
        return (self.folder / FILE).stat().st_size

    def bound_bytes(self) -> float:
        """Size of the values plus the entropy of their positions."""
        size = sum(p.numel() * p.element_size() for p in self.own.parameters() if p.requires_grad)
        if self.method == ELEMENTS:
            size += entropy_bytes(self.values, spread(self.own))
        return size


class ContiguousValues:
    """What merging must do to a model's weights at least: as many values, in contiguous memory.

    Args:
        weights: the targeted weights.
        density: values over entries of the weights.
    """

    def __init__(self, weights: list[torch.Tensor], density: float):
        self.parts = [weight.detach().flatten()[: round(density * weight.numel())].clone() for weight in weights]
        self.values = [torch.zeros(part.shape, device=part.device) for part in self.parts]
        self.originals: list[torch.Tensor] = []

    def merge(self) -> None:
        self.originals = [part.clone() for part in self.parts]
        for part, values in zip(self.parts, self.values, strict=True):
            part.copy_(part + values)

    def merge_and_unmerge(self) -> None:
        self.merge()
        for part, original in zip(self.parts, self.originals, strict=True):
            part.copy_(original)

    switch = merge_and_unmerge


OPERATIONS = ("save", "load", "merge", "merge_and_unmerge", "switch")


def _own_weights(base: nn.Module) -> nn.Module:
    model = sharing_weights(base)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    return model


def adapter(setting: Setting, seconds: float) -> dict[str, Table]:
    """Saving, loading, merging and switching relative to LoRA, and the file size."""
    base = base_of(setting)
    values = round(targeted_values(base) * setting.density)
    names = [name for name in methods_for(setting.base, setting.parameters) if name in ADAPTERS]
    names = [name for name in names if name not in CANNOT_UNMERGE]
    with tempfile.TemporaryDirectory() as folder:

        def build(name: str) -> Adapter:
            adapter = Adapter(name, base, values, Path(folder))
            adapter.load()
            adapter.switch()
            return adapter

        adapters, failed = working(names, build)
        limit = ContiguousValues([module.weight for module in targets(base).values()], setting.density)
        tables = {}
        for operation in OPERATIONS:
            calls = {name: getattr(each, operation) for name, each in adapters.items()}
            if hasattr(limit, operation):
                calls[CONTIGUOUS] = getattr(limit, operation)
            tables[operation.replace("_", " ")] = timed(calls, "LoRA", seconds / len(OPERATIONS)) | {"failed": failed}
        sizes = {
            name: {"values": each.values, "bytes": each.bytes(), "bytes_per_value": each.bytes() / each.values}
            | ({"over_bound": each.bytes() / each.bound_bytes()} if name in FGGM else {})
            for name, each in adapters.items()
        }
    tables["file"] = {"floor": "LoRA", "noise": 1.0, "rows": sizes}
    add_ratios_(tables["file"], "bytes_per_value")
    return tables


# Import -----------------------------------------------------------------------------------------


def import_(setting: Setting, seconds: float) -> dict[str, Table]:
    """Time to import a package in a new process."""
    return {"import": timed({name: functools.partial(import_seconds, name) for name in IMPORTED}, "peft", seconds)}


IMPORTED = ("peft", "fggm_peft")


def import_seconds(package: str) -> float:
    code = f"import time; start = time.process_time(); import {package}; print(time.process_time() - start)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


MEASUREMENTS: dict[str, Callable[[Setting, float], dict[str, Table]]] = {
    "training step": training_step,
    "decoding": decoding,
    "selection pass": selection_pass,
    "harm decay": harm_decay,
    "adapter": adapter,
    "import": import_,
}


def measure(case: Case, seconds: float) -> dict[str, Table]:
    """The tables of one case by their keys in a result file; each of its timings takes about ``seconds``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = MEASUREMENTS[case.measurement](case.setting, seconds)
    if case.measurement == "import":
        return tables
    where = {"setting": case.setting.as_figures()}
    return {f"{name}: {case.setting.text()}": {**where, **table} for name, table in tables.items()}

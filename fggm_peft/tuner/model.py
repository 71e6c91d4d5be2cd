"""``FGGMModel``: the tuner that PEFT makes when a config says ``peft_type="FGGM"``."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import get_quantization_kwargs
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .config import FGGMConfig
from .files.base_check import BaseCheck, fingerprint
from .files.indices import await_support_, entry_within
from .files.loading import fit_layers_to_state_dict
from .files.saving import encode_for_file_
from .hosts.bitsandbytes import guard_four_bit_layers
from .hosts.offloading import require_offloading_in_place
from .hosts.quantized_targets import include_quantized_layers_
from .hosts.sharding import require_unsharded
from .layer import FGGMLayer
from .layer_types import make_layer
from .merging.merge import commit_mode, pending, preview_merge
from .merging.report import MergeReport
from .settings.budget import resolve_budget_
from .several.mixed_batches import adapter_of_each_sample
from .several.weighted import add_weighted_adapter, new_combination
from .support import choose_supports, criterion_scores, fggm_layers, forecast_supports, write_supports
from .target import Target, find_targets

logger = logging.getLogger(__name__)


class FGGMModel(BaseTuner):
    """
    Adapts a model by sparse trainable deltas (FGGM, arXiv 2601.18261).

    An adapter whose criterion needs data is born empty, and ``fggm_peft.select_parameters`` fills it; one that needs
    none is filled here.

    Args:
        model: the model to adapt.
        config: an ``FGGMConfig``.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a targeted module is of no supported type.
    """

    prefix: str = "fggm_"
    tuner_layer_cls = FGGMLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config, model):
        require_unsharded(model)
        require_offloading_in_place(model)
        guard_four_bit_layers(model)
        include_quantized_layers_(peft_config, model)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ):
        if isinstance(target, FGGMLayer):
            layer = target
        else:
            layer = make_layer(target, current_key, **get_quantization_kwargs(self.model))
            layer.set_adapter(self.active_adapters)
            layer.train(target.training)
        if not peft_config.granularity.supports(layer.weight_shape):
            raise ValueError(
                f"{current_key}: granularity='{peft_config.granularity}' cannot divide a weight of shape "
                f"{list(layer.weight_shape)} into units; leave the module out with exclude_modules"
            )
        layer.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
        if layer is not target:
            # not by PEFT's _replace_module, which moves an adapter to where the weight is: that of an offloaded
            # layer is on the meta device
            setattr(parent, target_name, layer)

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            layers = fggm_layers(model, adapter_name)
            _warn_of_idle_patterns(self.peft_config[adapter_name], layers)
            resolve_budget_(self.peft_config[adapter_name], find_targets(model, adapter_name))
            forecast_supports(layers, self.peft_config[adapter_name], adapter_name)  # raises if it cannot be spent
            self._fill_without_data(model, adapter_name)
            self._make_room(layers, adapter_name)
            config = self.peft_config[adapter_name]
            if config.base_fingerprint is None:  # later it may be sharded
                config.base_fingerprint = fingerprint(layers) or None
        except Exception:
            _take_out(model, adapter_name)  # PEFT stops at the first bad module, with others wrapped by then
            raise

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT's, but values whose dtype the config names keep it."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        dtype = self.peft_config[adapter_name].training_dtype
        if dtype is not None:
            for layer in fggm_layers(self.model, adapter_name).values():
                for parameter in layer.trained(adapter_name):
                    parameter.data = parameter.data.to(getattr(torch, dtype))

    def _fill_without_data(self, model: nn.Module, adapter_name: str) -> None:
        """Choose the support at once if nothing has to be read for it, unless a saved config waits for its file's."""
        config = self.peft_config[adapter_name]
        layers = fggm_layers(model, adapter_name)
        on_meta = any(layer.fggm_values[adapter_name].is_meta for layer in layers.values())
        if not config.is_chosen_at_birth or on_meta or not layers or config.support_sizes:
            return
        choices = choose_supports(
            layers,
            config,
            adapter_name,
            lambda name: criterion_scores(layers[name], name, config, adapter_name),
        )
        write_supports(layers, config, adapter_name, choices)

    def _make_room(self, layers: dict[str, FGGMLayer], adapter_name: str) -> None:
        """Give the adapter of a saved config the sizes that it was saved with, for loaders that go by shapes."""
        config = self.peft_config[adapter_name]
        sizes, shapes = config.support_sizes or {}, config.index_shapes or {}
        check, keep_dtype = BaseCheck(layers, config), config.training_dtype is not None
        for name, layer in layers.items():
            if sizes and not layer.selected[adapter_name]:
                k, encoded = entry_within(sizes, name) or 0, entry_within(shapes, name)
                await_support_(Target(name, layer, adapter_name), k, encoded, check, keep_dtype)

    # With bias="fggm_only" the bias entries of chosen rows are parameters of their own, and the base's
    # bias never trains; PEFT would take the name for the whole bias. bias="all" is PEFT's own.

    def _whole_bias_trains(self) -> bool:
        return any(self.peft_config[name].bias == "all" for name in self.active_adapters if name in self.peft_config)

    def _check_new_adapter_config(self, config):
        if config.bias == "all":
            super()._check_new_adapter_config(config)

    def _mark_only_adapters_as_trainable(self, model):
        super()._mark_only_adapters_as_trainable(model)
        for module in model.modules():
            bias = getattr(module.get_base_layer(), "bias", None) if isinstance(module, FGGMLayer) else None
            if isinstance(bias, nn.Parameter) and not self._whole_bias_trains():
                bias.requires_grad_(False)

    def disable_adapter_layers(self):
        if self._whole_bias_trains():
            super().disable_adapter_layers()  # warns that the trained bias stays
        else:
            self._enable_adapter_layers(enabled=False)

    @classmethod
    def _get_learnable_bias_state_dict(cls, model, state_dict, config):
        if config.bias != "all":
            return {}
        return super()._get_learnable_bias_state_dict(model, state_dict, config)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names, beams = kwargs.get("adapter_names"), kwargs.get("num_beams")
        with adapter_of_each_sample(self, FGGMLayer, names, beams):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is a weighted combination of others, frozen as in LoRA; they stay as they are.

        What PEFT's merge functions make of the dense deltas, scales included, is computed on the union of the
        supports. Adapters of different granularities combine into single elements. Units of which nothing is left are
        not kept.

        Args:
            adapters: names of adapters.
            weights: one for each; may be negative.
            adapter_name: the new adapter's; if it exists already nothing is done but a warning.
            combination_type: "linear" (exact, by which deltas can be added and subtracted), "magnitude_prune", "ties",
                "dare_linear" or "dare_ties".
            density: share of each delta's entries, those of the whole weight counted, that pruning keeps.
            majority_sign_method: "total" or "frequency", for "ties" and "dare_ties".

        Raises:
            ValueError: an adapter does not exist or has no support yet, or the arguments do not fit together.
        """
        if adapter_name in self.peft_config:
            warnings.warn(f"adapter {adapter_name!r} exists already and stays as it is", stacklevel=2)
            return
        how = new_combination(combination_type, density, majority_sign_method)
        add_weighted_adapter(self, adapters, weights, adapter_name, how)

    # Merging -------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> MergeReport:
        """Merge adapters into the base; ``unmerge_adapter`` restores it bit for bit.

        Everything is checked before anything is changed.

        Args:
            adapter_names: which; the active ones by default.
            safe_merge: raise if a merged weight would be NaN or infinite.

        Returns:
            What became of each module's delta. It is logged too.

        Raises:
            ValueError: not finite, with ``safe_merge``.
            LossyMergeError: a quantized base would lose part of the delta (``quantized_merge="auto"``).
        """
        return self._merge_all(adapter_names, safe_merge, keep_originals=True)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out again: the base is what it was, bit for bit."""
        for layer in reversed([m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]):
            with onload_layer(layer):  # in reverse, because tied layers have changed one weight in turn
                layer.unmerge()

    def _merge_all(self, names: list[str] | None, safe_merge: bool, keep_originals: bool) -> MergeReport:
        self._check_merge_allowed()
        if isinstance(names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
        tuner_layers = {name: m for name, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)}
        ours = {name: m for name, m in tuner_layers.items() if isinstance(m, FGGMLayer)}
        preview_merge(ours, names, safe_merge)
        dtype = self._compute_dtype()
        records = []
        for name, layer in tuner_layers.items():
            with onload_layer(layer):
                if not isinstance(layer, FGGMLayer):  # another method's layer in a mixed model
                    layer.merge(safe_merge=safe_merge, adapter_names=names)
                    continue
                todo = pending(layer, names)
                mode = commit_mode(layer, todo) if todo else None
                record = layer.merge(safe_merge, names, keep_originals, quantized_merge=mode, dtype=dtype)
            if record is not None:
                records.append(replace(record, name=name))
        report = MergeReport(records)
        logger.info("%s", report)
        return report

    def _compute_dtype(self) -> torch.dtype:
        """The dtype that the model's own floating-point weights have, for layers that become dense."""
        own = (
            parameter.dtype
            for name, parameter in self.model.named_parameters()
            if parameter.is_floating_point() and f".{self.prefix}" not in name
        )
        return next(own, torch.float32)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ):
        if merge:
            self._merge_all(adapter_names, safe_merge, keep_originals=False)
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # Only unloading comes here, with the base layer as it is. PEFT's would give it the weight that
        # TrainableTokensWrapper shows, which is no parameter.
        setattr(parent, child_name, new_module)

    # Files ---------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        wanted = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT looks for names of modules, and finds none within torch's checkpoint_wrapper
        ours = re.compile(rf"\.fggm_(values|indices|bias)\.{re.escape(adapter_name)}$")
        wanted |= {key: tensor for key, tensor in state_dict.items() if ours.search(key)}
        encode_for_file_(model, config, adapter_name, wanted)
        return wanted

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: FGGMConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        fit_layers_to_state_dict(model, config, adapter_name, state_dict)
        return state_dict


def _take_out(model: nn.Module, adapter_name: str) -> None:
    """Undo an injection: the adapter leaves every layer, and a layer without adapters gives way to its base."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FGGMLayer) and adapter_name in layer.fggm_values:
            layer.delete_adapter(adapter_name)
            if not layer.fggm_values:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)


def _warn_of_idle_patterns(config: FGGMConfig, module_names: Iterable[str]) -> None:
    """As PEFT does for LoRA's ``rank_pattern``."""
    names = list(module_names)
    idle = [p for p in config.density_pattern or {} if not any(get_pattern_key([p], name) == p for name in names)]
    if idle:
        warnings.warn(
            f"The following density_pattern keys did not match any targeted module and were ignored: {sorted(idle)}.",
            RuntimeWarning,
            stacklevel=2,
        )

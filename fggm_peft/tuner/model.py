"""``FGGMModel``: the tuner that PEFT creates for ``peft_type="FGGM"``."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from accelerate import init_empty_weights
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules, get_pattern_key
from torch import Tensor, nn

from .config import FGGMConfig
from .files.base_check import fingerprint
from .files.indices import SupportIndices, await_supports_
from .files.loading import fit_layers_to_model_state, fit_layers_to_state_dict
from .files.saving import encode_for_file_
from .hosts.bitsandbytes import guard_four_bit_layers
from .hosts.offloading import require_offloading_in_place
from .hosts.quantized_targets import expand_all_linear_
from .hosts.sharding import plain_name, require_unsharded
from .layer import FGGMLayer
from .merging.merge import MIN_SURVIVAL, MergeReport, lossy_merge_error
from .parameters import FGGMParameter, FGGMParameters, matched_parameters, replace_everywhere_, targeted_layers
from .settings.budget import resolve_budget_
from .several.mixed_batches import adapter_of_each_sample
from .several.weighted import Combination, add_weighted_adapter
from .support import choose_supports, criterion_scores, forecast_supports, unwrapped, write_supports
from .target import Targets, find_targets

_TRAINED_HEADS = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}


class FGGMModel(BaseTuner):
    """
    Adapts a model by sparse trainable deltas (FGGM, arXiv 2601.18261).

    An adapter whose criterion needs data starts empty, and ``fggm_peft.select_parameters`` chooses its support. The
    support of other adapters is chosen here.

    The methods that add one adapter are also called with a ``MixedModel`` as ``self`` (docs/upstream), so they use only
    what ``BaseTuner`` has.

    Raises:
        TypeError: the type of a targeted module is not supported.
        ValueError: a targeted weight or the budget does not fit the config.
    """

    prefix: str = "fggm_"
    tuner_layer_cls = FGGMLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None and not peft_config.target_parameters:
            peft_config.target_modules = "all-linear"
        # for these task types, PEFT adds the head to the caller's config after the layers have been adapted
        saved = peft_config.modules_to_save or []
        heads = [name for name in _TRAINED_HEADS.get(peft_config.task_type, ()) if name not in saved]
        peft_config.modules_to_save = [*saved, *heads] or None
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config, key):
        return BaseTuner._check_target_module_exists(peft_config, plain_name(key))

    def _prepare_model(self, peft_config, model):
        require_unsharded(model)
        require_offloading_in_place(model)
        guard_four_bit_layers(model)
        expand_all_linear_(peft_config, model)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ):
        if isinstance(target, FGGMParameter) or isinstance(parent, FGGMParameters):
            return  # PEFT found the name of a parameter that is adapted
        is_mixed = not isinstance(self, FGGMModel)
        if is_mixed and parameter_name is not None:
            raise _not_mixable(current_key)
        layers = targeted_layers(self.model, target, current_key, parameter_name, **get_quantization_kwargs(self.model))
        for path, layer in layers.items():
            if is_mixed and (isinstance(layer, FGGMParameter) or layer.quantization_backend is not None):
                raise _not_mixable(path)
            if adapter_name in layer.fggm_values:
                continue  # targeted as a module and as a parameter
            if not layer.fggm_values:
                layer.set_adapter(self.active_adapters)
                layer.train(target.training)
            _add_to_layer(self.model, adapter_name, peft_config, path, layer)
        layer = layers.get(current_key, target)
        if layer is not target and not isinstance(layer, FGGMParameter):
            # PEFT's _replace_module would move the adapter to the meta device if the weight is offloaded
            setattr(parent, target_name, layer)

    def _inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage):
        keys = []
        for path, name, key in matched_parameters(model, peft_config.target_parameters):
            parent, target, target_name = _get_submodules(model, path)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(peft_config, adapter_name, target, target_name, parent, path, name)
            keys.append(key)
        return keys

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        require_adapter_name(model, adapter_name)
        if not self.peft_config[adapter_name].inference_mode:
            # the caller may use the config for other adapters too; PeftModel.from_pretrained(config=) must keep it
            self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        vars(self.peft_config[adapter_name]).pop("_of_file", None)
        if fit_layers_to_model_state not in [h.hook for h in model._load_state_dict_pre_hooks.values()]:
            model.register_load_state_dict_pre_hook(fit_layers_to_model_state)
        try:
            BaseTuner.inject_adapter(self, model, adapter_name, *args, **kwargs)
            config, targets = self.peft_config[adapter_name], find_targets(model, adapter_name)
            _warn_of_unused_patterns(config, targets)
            _warn_of_unknown_modules(config, model)
            resolve_budget_(config, targets)
            forecast_supports(targets, config)  # raises if the budget cannot be spent
            _choose_without_data(config, targets)
            await_supports_(config, targets)
            if not config.support_sizes:  # a new adapter; taken now, because the base may be sharded later
                config.base_fingerprint = fingerprint({path: t.layer for path, t in targets.items()}) or None
        except Exception:
            _remove_adapter(model, adapter_name)  # PEFT stops at the first unsupported module
            raise

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Like PEFT's, but values keep the config's ``training_dtype``."""
        BaseTuner._cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype)
        config = self.peft_config[adapter_name]
        if config.training_dtype is None and autocast_adapter_dtype:
            return
        for target in find_targets(self.model, adapter_name).values():
            # an adapter that awaits its file may have another dtype
            target.values.data = target.values.data.to(target.layer.values_dtype(config))

    def _enable_peft_forward_hooks(self, *args, **kwargs):
        return adapter_of_each_sample(self, FGGMLayer, kwargs.get("adapter_names"), kwargs.get("num_beams"))

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is a weighted combination of others, frozen as in LoRA.

        The result is that of PEFT's merge functions on the scaled dense deltas, computed on the union of the supports.
        Adapters of different granularities combine into single elements. Units whose values are zero are removed.

        Args:
            adapters: names of adapters.
            weights: one for each adapter; may be negative.
            adapter_name: name of the new adapter. If it exists, nothing changes except for a warning.
            combination_type: "linear" (exact, adds and subtracts deltas), "magnitude_prune", "ties", "dare_linear" or
                "dare_ties".
            density: share of each weight's entries that pruning keeps.
            majority_sign_method: "total" or "frequency", for "ties" and "dare_ties".

        Raises:
            ValueError: an adapter is missing or has no support yet, or the arguments cannot be combined.
        """
        if adapter_name in self.peft_config:
            warnings.warn(f"adapter {adapter_name!r} exists already and is not changed", stacklevel=2)
            return
        how = Combination(combination_type, density, majority_sign_method)
        add_weighted_adapter(self, adapters, weights, adapter_name, how)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base; ``unmerge_adapter`` restores it bit for bit.

        All layers are checked before the first one changes.

        Args:
            adapter_names: by default the active adapters.
            safe_merge: raise if a merged weight would be NaN or infinite.

        Raises:
            ValueError: a merged weight is not finite, with ``safe_merge``.
            LossyMergeError: a quantized base would lose part of the delta (``quantized_merge="auto"``).
            TypeError: a quantization backend cannot requantize.
        """
        self._merge_all(adapter_names, safe_merge, keep_originals=True)

    def unmerge_adapter(self) -> None:
        """Undo all merges: the base is what it was, bit for bit."""
        onload = self._onload()
        for layer in [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]:
            with onload(layer):
                layer.unmerge()

    def _merge_all(self, names: list[str] | None, safe_merge: bool, keep_originals: bool) -> None:
        self._check_merge_allowed()
        if isinstance(names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
        tuner_layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        self._check_merge(tuner_layers, names, safe_merge)
        onload = self._onload()
        # Tied layers, and layers around each other, change the same weight in turn. PEFT unmerges in the order of the
        # model, so merging goes in reverse.
        for layer in reversed(tuner_layers):
            with onload(layer):
                if isinstance(layer, FGGMLayer):
                    layer.merge(safe_merge, names, keep_originals)
                else:  # another method's layer in a mixed model
                    layer.merge(safe_merge=safe_merge, adapter_names=names)

    def _onload(self) -> Callable[[nn.Module], AbstractContextManager]:
        """PEFT's ``onload_layer`` if any module has a hook of accelerate. It takes as long as merging a small layer."""
        has_hooks = any("_hf_hook" in vars(module) for module in self.model.modules())
        return onload_layer if has_hooks else nullcontext

    def _check_merge(self, tuner_layers: list[BaseTunerLayer], names: list[str] | None, safe: bool) -> None:
        checked = [layer.check_merge(names, safe) for layer in tuner_layers if isinstance(layer, FGGMLayer)]
        report = MergeReport([record for record in checked if record is not None])
        if report.survived < MIN_SURVIVAL:
            raise lossy_merge_error(report)

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
        # called for unloading only; PEFT's would also set the weight that TrainableTokensWrapper shows, which is no
        # parameter
        if isinstance(child, FGGMParameters):
            replace_everywhere_(self.model, child, new_module)
        else:
            setattr(parent, child_name, new_module)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT looks for names of modules and misses those within torch's checkpoint_wrapper
        ours = re.compile(rf"\.fggm_(values|indices)\.{re.escape(adapter_name)}$")
        selected |= {key: tensor for key, tensor in state_dict.items() if ours.search(key)}
        encode_for_file_(model, config, adapter_name, selected)
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: FGGMConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        is_new = config.support_sizes is not None  # PEFT has added the adapter for this file
        try:
            state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            fit_layers_to_state_dict(model, config, adapter_name, state_dict)
        except Exception:
            if is_new:
                _remove_adapter(model, adapter_name)
                _forget_adapter(model, adapter_name)
            raise
        return state_dict


def _add_to_layer(
    model: nn.Module, adapter_name: str, peft_config: FGGMConfig, current_key: str, layer: FGGMLayer
) -> None:
    peft_config.granularity = peft_config.granularity.of_model(model, current_key)
    granularity = peft_config.granularity.of_weight(plain_name(current_key), layer.weight_shape)
    if not granularity.supports(layer.weight_shape):
        raise ValueError(
            f"{current_key}: granularity='{granularity}' does not support a weight of shape "
            f"{list(layer.weight_shape)}. Use another granularity, or leave the module out with `exclude_modules`."
        )
    if peft_config.needs_covariance and not layer.can_decay:
        raise ValueError(
            f"{current_key} is a {type(layer.get_base_layer()).__name__}, but harm decay supports only linear "
            "layers, experts and routers. Leave the module out with `exclude_modules`, or set harm_decay=0."
        )
    layer.update_layer(adapter_name, peft_config, granularity, inference_mode=peft_config.inference_mode)


def _not_mixable(path: str) -> ValueError:
    """The error for what a ``MixedModel``, which merges layer by layer, cannot merge."""
    return ValueError(
        f"{path}: a mixed model supports FGGM neither on parameters without a layer nor on quantized layers. Leave the "
        "module out with `exclude_modules`, or use get_peft_model without mixed=True."
    )


def _choose_without_data(config: FGGMConfig, targets: Targets) -> None:
    """Choose the support now if the criterion needs no data, and the config is not that of a saved adapter."""
    on_meta = any(target.values.is_meta for target in targets.values())
    if config.is_chosen_without_data and targets and not on_meta and not config.support_sizes:
        config.selection = None
        choices = choose_supports(targets, config, lambda path: criterion_scores(targets[path], config))
        write_supports(targets, config, choices)


def require_adapter_name(model: nn.Module, name: str) -> None:
    """Raise ``ValueError`` for a name with which PEFT, which finds adapters by parts of keys, would mix up tensors."""
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    wrapped = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, wrappers))
    paths = [name for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())]
    parts = {part for path in paths if not path.startswith(wrapped) for part in path.split(".")}
    parts |= {"base_model", "model", "base_layer", "modules_to_save", "original_module", *FGGMLayer.adapter_layer_names}
    parts |= {*FGGMLayer.other_param_names, *dir(nn.ParameterDict), *dir(SupportIndices)}
    if not name or "." in name or name in parts:
        raise ValueError(
            f"an adapter cannot be named {name!r}: the name must not be empty, contain a dot, or be a part of the "
            "name of a module or a parameter. Choose another name."
        )


def _remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Undo an injection: remove the adapter, and unwrap layers that have no adapter left."""
    for layer in model.modules():
        if isinstance(layer, FGGMLayer) and adapter_name in layer.fggm_values:
            layer.delete_adapter(adapter_name)
    for wrapper in list(model.modules()):
        is_wrapper = isinstance(wrapper, (FGGMLayer, FGGMParameters)) and not isinstance(wrapper, FGGMParameter)
        if is_wrapper and not any(m.fggm_values for m in wrapper.modules() if isinstance(m, FGGMLayer)):
            replace_everywhere_(model, wrapper, wrapper.base_layer)


def _forget_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove the modules that PEFT has added for an adapter besides its layers, and its config."""
    for wrapper in [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]:
        wrapper.delete_adapter(adapter_name, [name for name in wrapper.active_adapters if name != adapter_name])
        if not wrapper._adapters:
            replace_everywhere_(model, wrapper, wrapper.original_module)
    base = unwrapped(model)
    base.peft_config.pop(adapter_name, None)
    if not base.peft_config:
        del base.peft_config


def _warn_of_unused_patterns(config: FGGMConfig, targets: Targets) -> None:
    """As PEFT does for LoRA's ``rank_pattern``."""
    patterns = config.density_pattern or {}
    unused = sorted(p for p in patterns if not any(get_pattern_key([p], path) == p for path in targets))
    if unused:
        text = f"The following density_pattern keys did not match any targeted module and were ignored: {unused}."
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _warn_of_unknown_modules(config: FGGMConfig, model: nn.Module) -> None:
    """PEFT ignores a name of a list that no module has. A regex may name experts that are parameters now."""
    targets, problem = config.target_modules, ""
    if isinstance(targets, (set, list)):
        endings = {f".{plain_name(path)}" for path, _ in model.named_modules()}
        unknown = [name for name in sorted(targets) if not any(e.endswith(f".{name}") for e in endings)]
        problem = f" contains {unknown}, but no module has such a name" if unknown else ""
    elif hasattr(getattr(model, "config", None), "model_type") and not config.target_parameters:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        lora = LoraConfig(target_modules=targets)
        try:
            convert_peft_config_for_transformers(lora, model, conversions=None)
        except ValueError:  # only some of the parts of a parameter
            lora.target_parameters = {"experts"}
        problem = f"={targets!r} also names parts of experts that are no modules" if lora.target_parameters else ""
    if problem:
        text = f"target_modules{problem}. Experts may be parameters: see `target_parameters`."
        warnings.warn(text, RuntimeWarning, stacklevel=2)

"""The names of PEFT, transformers and accelerate that the package uses and their documentation does not promise.

A scheduled workflow (``.github/workflows/canary.yml``) runs this module against PEFT's main branch.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import fggm_peft
from fggm_peft.training.trainer import FGGMTrainer
from fggm_peft.tuner import FGGMLayer, FGGMModel

LIBRARIES = ("accelerate", "peft", "transformers")
PACKAGE = Path(fggm_peft.__file__).parent

# methods and attributes with a leading underscore that are overridden, called or read, by the class that defines them
PRIVATE = {
    "accelerate.Accelerator": {"_dataloaders"},
    "accelerate.hooks": {"_hf_hook"},
    "peft.PeftModel": {"_enable_peft_forward_hooks"},
    "peft.tuners.tuners_utils.BaseTuner": {
        "_cast_adapter_dtype",
        "_check_merge_allowed",
        "_check_target_module_exists",
        "_create_and_replace",
        "_get_adapter_state_dict",
        "_inject_parameters",
        "_prepare_adapter_config",
        "_prepare_model",
        "_remap_adapter_state_dict_for_load",
        "_replace_module",
        "_unload_and_optionally_merge",
    },
    "peft.tuners.tuners_utils.BaseTunerLayer": {
        "_disable_adapters",
        "_get_base_layer_device_and_dtype",
        "_get_embed_scale",
        "_move_adapter_to_device_of_base_layer",
    },
    "peft.utils.other": {"_adapters", "_mixed_batch_forward"},
    "transformers.Trainer": {
        "_get_output_dir",
        "_get_train_sampler",
        "_load_best_model",
        "_load_from_checkpoint",
        "_save",
        "_save_checkpoint",
        "_save_rng_state",
    },
    "transformers.integrations.peft.PeftAdapterMixin": {"_hf_peft_config_loaded"},
}


def resolve(path: str) -> object:
    """The module, class or function with this dotted path."""
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


def imports() -> set[str]:
    """Dotted paths of everything that the package imports from the libraries."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_missing(path: str) -> bool:
    try:
        resolve(path)
    except (AttributeError, ImportError):
        return True
    return False


def test_every_imported_name_exists():
    names = imports()
    assert "peft.tuners.tuners_utils._maybe_include_all_linear_layers" in names
    assert not [name for name in sorted(names) if is_missing(name)]


def test_every_private_name_exists():
    missing = []
    for path, names in PRIVATE.items():
        owner = resolve(path)
        source = inspect.getsource(owner)  # attributes of instances exist in the source only
        missing += [f"{path}: {name}" for name in sorted(names) if not hasattr(owner, name) and name not in source]
    assert not missing


def test_the_list_contains_every_private_method_that_the_package_overrides():
    listed = set().union(*PRIVATE.values(), {"_abc_impl"})  # the last is of Python's abc
    forgotten = set()
    for kind in (FGGMModel, FGGMLayer, FGGMTrainer, *FGGMLayer.__subclasses__()):
        ours = [base for base in kind.__mro__ if base.__module__.startswith("fggm_peft")]
        theirs = [base for base in kind.__mro__ if base.__module__.startswith(LIBRARIES)]
        overridden = {n for base in ours for n in vars(base)} & {n for base in theirs for n in vars(base)}
        forgotten |= {name for name in overridden if name.startswith("_") and not name.startswith("__")} - listed
    assert not forgotten

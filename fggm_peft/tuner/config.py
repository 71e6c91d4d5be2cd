"""``FGGMConfig``: everything that decides what may move, in the form that PEFT saves as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from ..core.criteria import CRITERIA
from ..core.granularity import Granularity, granularity_from
from ..core.registry import require_one_of
from ..core.threshold import ParameterBudget, ThresholdPolicy, TopDensity, policy_from_dict
from .files.model_card import complete_card
from .files.task_scores import record_of
from .files.tensors import require_readable
from .registration import add_peft_type
from .settings.budget import require_budget
from .settings.file import require_file_settings
from .settings.selection import (
    require_criterion_settings,
    require_density,
    require_estimate_settings,
    require_num_samples,
    score_bytes,
)

QUANTIZED_MERGES = ("auto", "requantize", "dequantize", "keep")
DEFAULT_DENSITY = 0.3


@dataclass
class FGGMConfig(PeftConfig):
    """
    Configuration of Fisher-Guided Gradient Masking (FGGM, arXiv 2601.18261) as a PEFT method.

    Example:

    ```py
    >>> from fggm_peft import FGGMConfig, select_parameters
    >>> config = FGGMConfig(target_modules="all-linear", density=0.3, granularity="row")
    >>> model = get_peft_model(base_model, config)
    >>> report = select_parameters(model, dataloader)
    ```

    Raises:
        ValueError: a value is out of its range; the message says the value and the range.
    """

    density: Optional[float] = field(
        default=None,
        metadata={
            "help": "Share of each targeted weight that may move, in (0, 1]; 0.3 when neither it nor `threshold` is "
            "given. Shorthand for `threshold=TopDensity(density)`."
        },
    )
    threshold: Optional[Union[ThresholdPolicy, dict[str, Any]]] = field(
        default=None,
        metadata={
            "help": "Threshold policy: TopDensity, ScoreMass, MeanPlusStd, AbsoluteScore or ParameterBudget (or the "
            "dict that its `to_dict` gives). Use it or `density`, not both."
        },
    )
    budget: Optional[Union[int, str]] = field(
        default=None,
        metadata={
            "help": "How many values may train in all, spent over the whole model by ParameterBudget: a number; "
            "'50MiB', the bytes that the saved values and indices may take, at 4 bytes a value (the file's header "
            "comes on top); '1%' of the entries of the targeted weights; or 'lora:r=16', as many as PEFT's LoRA of "
            "that rank trains on the same modules. Use it or `density` or `threshold`."
        },
    )
    budget_floor: Optional[Union[float, dict[str, float]]] = field(
        default=None,
        metadata={
            "help": "Part of `budget`: the share of its rows (columns, elements) that every module gets first, so that "
            "none starves. One number, or module type (the last part of the path) -> number, with 'default' for the "
            "others, e.g. {'q_proj': 0.01, 'default': 0.0}."
        },
    )
    resolved_budget: Optional[int] = field(
        default=None,
        metadata={"help": "How many values `budget` is on the targeted modules. Written by the library."},
    )
    max_rows: Optional[int] = field(
        default=None,
        metadata={
            "help": "At most so many rows (or columns) in any one module, whatever the threshold says: the best ones. "
            "A delta of k rows is a LoRA of rank k. Not for granularity='element'."
        },
    )
    granularity: Granularity = field(
        default="row",  # type: ignore[assignment]  # names and dicts become instances in __post_init__
        metadata={
            "help": "What is chosen and moves as one: 'row' (an output feature, the paper's choice), 'column' (an "
            "input feature), 'element' (a single weight), a Granularity with arguments or its dict."
        },
    )
    criterion: str = field(
        default="fisher",
        metadata={
            "help": "What ranks the units, on the task's data: 'fisher' (diagonal Fisher information F), "
            "'gradient_low_magnitude' (mean gradient over |W|), 'output_magnitude' (rows, by a forward pass); on a "
            "`reference` too: 'gain_per_harm' (sqrt(F) / F_ref), 'fisher_ratio' (F / F_ref), 'input_ratio' (columns, "
            "by forward passes); without data, chosen when the adapter is made: 'random', 'weight_magnitude'. Or a "
            "name of your own in `fggm_peft.CRITERIA`."
        },
    )
    reference: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "What the model should keep, for criteria that weigh a task against it: 'self' (text that the "
            "model writes itself), 'history' (scores of earlier tasks), a file or folder with saved scores, or a list "
            "of these. `select_parameters(reference=...)` takes a dataloader of general text too, and trainers take "
            "the path of a text (.txt)."
        },
    )
    reference_texts: int = field(
        default=64, metadata={"help": "How many texts the model writes for `reference='self'`."}
    )
    reference_length: int = field(default=128, metadata={"help": "Tokens of each of these texts, at most."})
    history: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Files or folders with saved scores of earlier tasks, for `reference='history'`. Those that were "
            "selected on the same model in this process are known without."
        },
    )
    protect: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Earlier deltas whose entries should stay: folders, Hub ids, or 'history' (what was selected on "
            "this model before). The support is then chosen by `select_parameters`, whatever the criterion."
        },
    )
    protection: float = field(
        default=1.0,
        metadata={
            "help": "How strongly, in [0, 1]: 1 forbids the entries of `protect`, less scales their scores by "
            "1 - protection. A unit that overlaps them in part is scaled by its share."
        },
    )
    save_scores: bool = field(
        default=False,
        metadata={
            "help": "Write the scores of the task, `fggm_scores.safetensors`, beside the adapter when it is saved, as "
            "a reference for later tasks."
        },
    )
    fisher_labels: Literal["data", "model"] = field(
        default="data",
        metadata={
            "help": "Where the labels of the Fisher pass come from: 'data' (empirical Fisher, the paper) or 'model' "
            "(true Fisher: drawn from the model's own distribution)."
        },
    )
    fisher_estimate: Literal["exact", "sketch"] = field(
        default="exact",
        metadata={
            "help": "'exact' Fisher information, or 'sketch': an unbiased estimate by `sketch_size` random "
            "projections of each sample's gradient, drawn by `seed`; at every length nearly as cheap as the frozen "
            "model's own passes. For rows and columns, not for elements; exact where that takes no more operations."
        },
    )
    sketch_size: int = field(
        default=16,
        metadata={"help": "Projections of `fisher_estimate='sketch'`; a score's variance is in proportion to 1 / it."},
    )
    num_samples: Optional[Union[int, Literal["auto"]]] = field(
        default="auto",
        metadata={
            "help": "How many samples the Fisher pass uses: a number, None for all, or 'auto': from 32 to 1024, "
            "doubling, until two halves of them would choose alike (agreement 0.8)."
        },
    )
    score_memory: Optional[Union[int, str]] = field(
        default=None,
        metadata={
            "help": "Bound on the memory that running scores take, in bytes or as '8GiB'; beyond it the data is passed "
            "over several times. Default: no bound. Element scores take 8 bytes an entry, rows and columns nearly none."
        },
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of whatever is drawn: random scores, model labels. The global RNG is left alone."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start the deltas at zero, so that the adapted model is the base model. False draws them from a "
            "normal distribution instead and is used only for testing."
        },
    )
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "List of module names, or a regex, of the modules to adapt; 'all-linear' for every linear layer "
            "but the output head. Default: 'all-linear'. Linear, Conv1D, Conv1d/2d/3d, Embedding and quantized "
            "linear layers are supported."
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "List of module names, or a regex, of the modules not to adapt."},
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Modules apart from FGGM layers that are trained whole and saved, such as a new head."},
    )
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = field(
        default=None,
        metadata={
            "help": "Tokens whose embeddings are trained beside the delta, such as new ones: indices into the input "
            "embedding, or a dict of embedding name -> indices. As in LoRA."
        },
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None,
        metadata={"help": "Layer indices to adapt. An integer adapts that layer only."},
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "Name of the nn.ModuleList that `layers_to_transform` counts in, where it is not a common one."
        },
    )
    density_pattern: Optional[dict[str, float]] = field(
        default_factory=dict,
        metadata={
            "help": "Module names or regexes with a density of their own, e.g. {'q_proj': 0.1}. These modules are "
            "chosen by TopDensity, layer by layer; all others by `density` or `threshold`."
        },
    )
    bias: Literal["none", "all", "fggm_only"] = field(
        default="none",
        metadata={
            "help": "'fggm_only' trains the bias entries of the chosen rows (needs granularity='row'); 'all' trains "
            "every bias of the model whole, as it does in LoRA."
        },
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={
            "help": "True if the targeted layers store their weight as (fan_in, fan_out), like GPT-2's Conv1D. It is "
            "recognised from the layer; a wrong value is corrected with a warning."
        },
    )
    quantized_merge: Literal["auto", "requantize", "dequantize", "keep"] = field(
        default="auto",
        metadata={
            "help": "How a delta is merged into a quantized layer. 'auto': requantize if at least 95 % of the delta "
            "survives, else an error; 'requantize': always; 'dequantize': the layer becomes dense; 'keep': the "
            "layer stays as it is, with the delta beside it, frozen and exact."
        },
    )
    selection: Optional[dict[str, Any]] = field(
        default=None,
        metadata={"help": "What `select_parameters` found: samples, agreement, densities. Written by the library."},
    )

    support_sizes: Optional[dict[str, int]] = field(
        default=None,
        metadata={
            "help": "How many units each module's support has, written by the library when an adapter is saved, so "
            "that loaders which go by shapes, such as transformers' own, find room for it."
        },
    )
    index_shapes: Optional[dict[str, dict[str, list[int]]]] = field(
        default=None,
        metadata={
            "help": "The shapes of each module's encoded indices, written by the library beside the sizes for the "
            "same loaders."
        },
    )
    training_dtype: Optional[Literal["float32", "bfloat16"]] = field(
        default=None,
        metadata={
            "help": "What the values are trained in, whatever the base's dtype or quantization: 'float32', or "
            "'bfloat16' for half the memory, with an optimizer that rounds stochastically. None: PEFT's "
            "`autocast_adapter_dtype` decides, which is float32 unless it is False."
        },
    )
    delta_dtype: Optional[Literal["float32", "bfloat16", "float16"]] = field(
        default=None,
        metadata={
            "help": "What deltas are rounded to when they are saved; None: as trained. Loading makes them float32 "
            "again."
        },
    )
    check_base: bool = field(
        default=True,
        metadata={
            "help": "Whether loading onto another base than the adapter was made on is an error (False: a warning). "
            "It is not saved."
        },
    )
    base_fingerprint: Optional[dict[str, str]] = field(
        default=None,
        metadata={"help": "Module -> shape and sampled entries of the base's weight. Written by the library."},
    )
    density_by_module: Optional[dict[str, str]] = field(
        default=None,
        metadata={"help": "Modules, * for numbers -> 'NUMBERS:DENSITY ...'. Written by the library."},
    )
    made_with: Optional[dict[str, str]] = field(
        default=None, metadata={"help": "Versions of the libraries that saved it. Written by the library."}
    )
    fggm_format: Optional[int] = field(
        default=None,
        metadata={"help": "Version of the file format, None before there were versions. Written by the library."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self.granularity = granularity_from(self.granularity)
        self._resolve_threshold()
        self._check_budget()
        require_criterion_settings(self)
        require_one_of("fisher_labels", self.fisher_labels, ("data", "model"))
        require_estimate_settings(self)
        require_one_of("quantized_merge", self.quantized_merge, QUANTIZED_MERGES)
        require_one_of("bias", self.bias, ("none", "all", "fggm_only"))
        require_one_of("training_dtype", self.training_dtype, (None, "float32", "bfloat16"))
        require_file_settings(self)
        if self.bias == "fggm_only" and not self.granularity.has_bias:
            raise ValueError(
                f"bias={self.bias!r} trains the bias entries of chosen rows and needs granularity='row', "
                f"got granularity='{self.granularity}'"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2**63), got {self.seed!r}")
        require_num_samples(self.num_samples)
        if self.score_memory is not None:
            score_bytes(self.score_memory)
        if not isinstance(self.density_pattern or {}, dict):
            raise ValueError(f"density_pattern must be a dict of module name -> density, got {self.density_pattern!r}")
        self.density_pattern = dict(self.density_pattern or {})
        for pattern, density in self.density_pattern.items():
            require_density(f"density_pattern[{pattern!r}]", density)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")

    def _resolve_threshold(self) -> None:
        if isinstance(self.threshold, dict):
            self.threshold = policy_from_dict(self.threshold)
        if self.budget is not None:
            for name in ("density", "threshold"):
                if getattr(self, name) is not None:
                    raise ValueError(f"give budget ({self.budget!r}) or {name} ({getattr(self, name)!r}), not both")
        elif self.threshold is None:
            self.density = DEFAULT_DENSITY if self.density is None else self.density
            require_density("density", self.density)
        elif not isinstance(self.threshold, ThresholdPolicy):
            raise ValueError(f"threshold must be a ThresholdPolicy or its dict, got {self.threshold!r}")
        elif self.density is not None:
            raise ValueError(f"give density ({self.density!r}) or threshold ({self.threshold!r}), not both")

    def _check_budget(self) -> None:
        if self.budget is not None:
            require_budget(self.budget)
            if self.density_pattern:
                raise ValueError(
                    f"density_pattern ({self.density_pattern!r}) would be spent beside the budget ({self.budget!r}); "
                    "give the least of a module type as budget_floor"
                )
        if self.budget_floor is not None:
            if self.budget is None:
                raise ValueError(f"budget_floor ({self.budget_floor!r}) is a part of a budget: give budget too")
            self._as_policy(1)  # checks the floor's values
        if self.max_rows is None:
            return
        if not isinstance(self.max_rows, int) or isinstance(self.max_rows, bool) or self.max_rows < 1:
            raise ValueError(f"max_rows must be an integer > 0 or None, got {self.max_rows!r}")
        if not self.granularity.is_slice:
            raise ValueError(
                f"max_rows ({self.max_rows!r}) bounds rows or columns and has no meaning for "
                f"granularity='{self.granularity}'; "
                "give a budget or a density"
            )

    def _as_policy(self, count: int) -> ParameterBudget:
        return ParameterBudget(count, floor=0.0 if self.budget_floor is None else self.budget_floor)

    @property
    def is_chosen_at_birth(self) -> bool:
        """Whether the support is known when the adapter is made, without ``select_parameters``."""
        return not CRITERIA[self.criterion].needs_data and not self.protect

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, without ``check_base``: whoever loads decides, and what is in a file would go before it."""
        data = {**super().to_dict(), "granularity": self.granularity.to_dict()}
        return {name: value for name, value in data.items() if name != "check_base"}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: Optional[str] = None, **kwargs: Any):
        """As PEFT's; ``check_base`` may be given. A file of tensors in the folder is looked at first.

        So ``PeftModel.from_pretrained`` refuses one that cannot be read before the model is touched.

        Raises:
            AdapterFileError: it is damaged, or has keys that no adapter has.
        """
        require_readable(Path(pretrained_model_name_or_path) / (subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; completes the model card that PEFT has put there, and writes the scores if asked to."""
        super().save_pretrained(save_directory, **kwargs)
        complete_card(Path(save_directory), self)
        if self.save_scores and (record := record_of(self)) is not None and record.scores:
            record.save(Path(save_directory))

    def policy(self, module_name: str | None = None) -> ThresholdPolicy:
        """The threshold policy of a module; of all without a density of their own if no name is given."""
        patterns = self.density_pattern or {}
        if module_name is not None and patterns:
            key = get_pattern_key(patterns.keys(), module_name)
            if key in patterns:
                return TopDensity(density=patterns[key])
        if self.budget is not None:
            count = self.budget if isinstance(self.budget, int) else self.resolved_budget
            if count is None:
                raise ValueError(f"budget={self.budget!r} becomes a number once the adapter is on a model")
            return self._as_policy(count)
        if self.threshold is None:
            assert self.density is not None
            return TopDensity(density=self.density)
        assert isinstance(self.threshold, ThresholdPolicy)
        return self.threshold

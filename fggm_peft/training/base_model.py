"""Loads the base model and its tokenizer, dense or quantized by bitsandbytes, onto the device of this process."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from ..tuner.files.hub import expanded, may_be_hub_id
from ..tuner.settings.fields import setting

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["4bit", "8bit"]


class BaseModelError(ValueError):
    """The base model or its tokenizer cannot be loaded."""


def this_process() -> PartialState:
    """This process among those that a launcher started (accelerate launch, torchrun), connected to the others."""
    import torch
    from accelerate import PartialState

    has_accelerator = getattr(torch, "accelerator", torch.cuda).is_available()
    # without cpu=True, accelerate does not connect several processes on CPUs
    return PartialState() if has_accelerator else PartialState(cpu=True)


def disconnect() -> None:
    """Disconnect this process from the others, once all are done.

    Without it, a thread of gloo may abort the process while the interpreter ends (pytorch/pytorch#179291). DDP must be
    freed before: it would free the last reference to the process group while it holds Python's lock, and wait for
    threads of gloo that wait for the lock.
    """
    from accelerate import PartialState

    if PartialState._shared_state:  # else no process was connected
        gc.collect()
        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()


def computes_bfloat16() -> bool:
    """Whether the device of this process multiplies bfloat16 in hardware. If not, float32 is faster."""
    import torch

    if this_process().device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def launched_with_fsdp() -> bool:
    """Whether ``accelerate launch`` is configured to shard the model over its processes."""
    from accelerate.utils import parse_flag_from_env

    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def shard_as_launched(model: Any) -> Any:
    """The model, sharded over the processes if ``accelerate launch`` is configured to do so."""
    if not launched_with_fsdp():
        return model
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    if not accelerator.is_fsdp2:
        raise BaseModelError("sharding needs an accelerator and FSDP version 2; set fsdp_version: 2 in its config")
    # accelerate shards a model only together with an optimizer; this one makes no step
    model, _ = accelerator.prepare(model, torch.optim.SGD([next(model.parameters())], lr=0.0))
    return model


@dataclass(frozen=True)
class BaseModel:
    """Which base model to load, and in which form."""

    name: str = field(metadata={"help": "Folder or Hub id of a causal language model."})
    revision: Optional[str] = setting(None, "Branch, tag or commit of a Hub id.")
    dtype: Dtype = setting("auto", "'auto' is the checkpoint's dtype.")
    quantization: Optional[Quantization] = setting(
        None, "Quantize a dense checkpoint with bitsandbytes (4bit: nf4, double quantization)."
    )
    device_map: Optional[str] = setting(None, "As in transformers, e.g. auto; None: the device of this process.")
    attention: Optional[str] = setting(None, "attn_implementation of transformers, e.g. sdpa.")
    trust_remote_code: bool = setting(False, "Run code that comes with the checkpoint.")

    @property
    def is_quantized(self) -> bool:
        """Whether the model is quantized: when it is loaded, or already in its folder."""
        file = Path(expanded(self.name)) / "config.json"
        return self.quantization is not None or (file.is_file() and '"quantization_config"' in file.read_text())

    def load(self) -> PreTrainedModel:
        """The causal language model, in eval mode; raises ``BaseModelError`` if it cannot be loaded."""
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": self.dtype, "device_map": self.device_map}
        if self.attention:
            options["attn_implementation"] = self.attention
        device = this_process().device
        if self.quantization:
            options["quantization_config"] = self._quantization_config()
            # some versions of bitsandbytes cannot move quantized layers
            options["device_map"] = self.device_map or {"": device}
        model = self._load(AutoModelForCausalLM, **options)
        # a model that will be sharded may be larger than one device
        is_placed = options["device_map"] is not None or getattr(model, "is_quantized", False) or launched_with_fsdp()
        return model if is_placed else model.to(device)

    def load_tokenizer(self, as_saved: bool = False) -> PreTrainedTokenizerBase:
        """The tokenizer. If it has no padding token, the end token is used, unless it must stay as it was saved."""
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer)
        if tokenizer.pad_token is None and not as_saved:
            # padding is masked and has no loss, so any token will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    def _load(self, auto_class: Any, **options: Any) -> Any:
        name = expanded(self.name)
        if not Path(name).is_dir() and not may_be_hub_id(name):
            raise BaseModelError(f"no folder {self.name!r}; give a model's folder or a Hub id")
        options |= {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}
        try:
            return auto_class.from_pretrained(name, **options)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise BaseModelError(f"cannot load {self.name!r} as a causal language model: {reason}") from error

    def _quantization_config(self) -> Any:
        import torch
        from transformers import BitsAndBytesConfig

        if self.quantization == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if self.dtype == "auto" else getattr(torch, self.dtype),
        )

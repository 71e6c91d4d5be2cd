"""A vLLM plugin that serves the FGGM adapters of a folder: each is exported as a LoRA when it is first requested."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from ..deltas.to_lora import export_lora
from ..tuner.files.atomic import digest_of_files

FOLDER = "FGGM_ADAPTERS"
"""Environment variable with the folder that contains a folder for each adapter."""
EXPORTED = ".lora"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def register() -> None:
    """Register the resolver if ``FGGM_ADAPTERS`` is set; vLLM calls this (entry point ``vllm.general_plugins``).

    Raises:
        NotADirectoryError: the variable names no folder.
    """
    if not (name := os.environ.get(FOLDER)):
        return
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"{FOLDER}={name} is not a folder; set it to the folder with your adapters")
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class FGGMResolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            path = await asyncio.to_thread(exported, folder, lora_name, base_model_name)
            if path is None:
                return None
            number = 1 + int(digest_of_files({path.name: path / WEIGHTS})[:12], 16)
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))

    LoRAResolverRegistry.register_resolver("FGGM", FGGMResolver())


def exported(folder: Path, name: str, base: str) -> Path | None:
    """The folder of the adapter's LoRA, which is written if it is missing or the adapter has changed.

    Args:
        folder: contains a folder for each adapter. The LoRAs are in its subfolder ``.lora``.
        name: of the adapter, from a request: no path, so that a request cannot read other folders.
        base: the served model. An adapter of another base is not found.

    Returns:
        None if there is no such adapter.

    Raises:
        ValueError: the adapter has no LoRA, see ``export_lora``.
    """
    adapter = folder / name
    if name != adapter.name or name.startswith(".") or not (adapter / CONFIG).is_file():
        return None
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != "FGGM" or config.get("base_model_name_or_path") != base:
        return None
    digest = digest_of_files({part: adapter / part for part in (CONFIG, WEIGHTS)})
    lora = folder / EXPORTED / f"{name}-{digest[:16]}"
    if not (lora / CONFIG).is_file():  # it is written last
        export_lora(adapter, lora, base)
    return lora

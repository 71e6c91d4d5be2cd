"""Half fine-tuning: a random half of each transformer block is frozen in each task."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from .method import METHODS, Method


@METHODS.register("hft")
@dataclass
class HFT(Method):
    """Half fine-tuning (arXiv 2404.18466, figure 2): each task freezes another random half of every block.

    The projections of the attention, those of the feed-forward network, and the norms are halved separately. Of an odd
    number, half of the blocks freeze the larger part and the others the smaller one. Embeddings, the last norm and the
    head train.
    """

    def begin_task(self, model, examples):
        model = super().begin_task(model, examples)
        generator = torch.Generator().manual_seed(self.task_seed)
        for groups in similar_groups(model).values():
            for rank, index in enumerate(torch.randperm(len(groups), generator=generator).tolist()):
                modules = groups[index]
                count = (len(modules) + (rank < len(groups) // 2)) // 2
                for chosen in torch.randperm(len(modules), generator=generator)[:count].tolist():
                    modules[chosen].requires_grad_(False)
        return model


def similar_groups(model: nn.Module) -> dict[tuple[str, bool], list[list[nn.Module]]]:
    """Kind of a group -> for each block its group: the matrices, or the norms, of one parent module."""
    groups: dict[tuple[str, bool], dict[str, list[nn.Module]]] = {}
    for name, module in model.named_modules():
        parent, parameters = name.rpartition(".")[0], list(module.parameters(recurse=False))
        if parameters and re.search(r"\.\d+(\.|$)", parent):  # inside a numbered block
            kind = re.sub(r"\d+", "#", parent), parameters[0].dim() > 1
            groups.setdefault(kind, {}).setdefault(parent, []).append(module)
    return {kind: list(blocks.values()) for kind, blocks in groups.items()}

"""Estimates of row and column scores from a few random projections.

The squared length of a gradient's row ``v`` ``[i]`` is estimated by ``|v @ S| ** 2 / r`` with random signs ``S``
``[i, r]``. The estimate is unbiased, because ``S @ S.mT / r`` is the identity on average, and it needs no gradient
matrix: ``v @ S`` is a row of ``g.mT @ (x @ S)``. For columns exchange x and g.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .per_sample import InputDigest, LinearGradients, gram_is_cheaper, same_memory


def sketch_is_cheaper(positions: int, outputs: int, inputs: int, size: int, shared_by: int = 1) -> bool:
    """Whether ``size`` projections for row scores take fewer operations than the cheaper exact form.

    Per sample and layer the sketch takes ``r * (t * i / shared_by + t * o)`` operations. The Gram form has ``t`` for
    ``r``, and the direct form takes ``t * o * i``. For column scores exchange inputs and outputs.
    """
    if gram_is_cheaper(positions, outputs, inputs, shared_by):
        return size < positions
    return size * (inputs / shared_by + outputs) < outputs * inputs


class Sketch:
    """Random signs for every sample and module of a pass, independent of the rest of the batch and of the device.

    There is one table of signs for each width. Its rows are flipped by signs of the sample and the module, so that the
    errors of samples are uncorrelated; a table for each sample would take ``r`` times as long to draw.

    Args:
        size: ``r``, the number of projections.
        seed: of all signs.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._tables: dict[tuple[int, torch.device], Tensor] = {}
        self._last: tuple[Tensor, str, Sequence[int], list[Tensor]] | None = None

    def project(self, x: Tensor, path: str, samples: Sequence[int], remember: bool = False) -> list[Tensor]:
        """``x[b] @ S[b]`` of each sample, ``[t, r]``, in float32 at least.

        ``path`` and ``samples`` determine the signs. ``remember`` keeps the result for an equal call that follows.
        """
        last = self._last
        if last is not None and same_memory(last[0], x) and last[1:3] == (path, samples):
            return last[3]
        table, flips = self._table(x.shape[2], x.device), self._flips(path, samples, x.shape[2]).to(x.device)
        wide = torch.promote_types(x.dtype, torch.float32)
        # sample by sample, because a wide copy of the whole batch would take as much memory as x, or more
        projected = [sample.to(wide) @ (flip[:, None] * table).to(wide) for sample, flip in zip(x, flips, strict=True)]
        self._last = (x, path, samples, projected) if remember else None
        return projected

    def forget(self) -> None:
        """Release the remembered result."""
        self._last = None

    def _table(self, width: int, device: torch.device) -> Tensor:
        if (width, device) not in self._tables:
            self._tables[width, device] = self._signs(f"table {width}", width, self.size).to(device)
        return self._tables[width, device]

    def _flips(self, path: str, samples: Sequence[int], width: int) -> Tensor:
        return torch.stack([self._signs(f"{sample} {path}", width) for sample in samples])

    def _signs(self, purpose: str, *size: int) -> Tensor:
        key = hashlib.blake2b(f"{self.seed} {purpose}".encode(), digest_size=8).digest()
        # torch's CPU generator uses at most 32 bits of the seed
        generator = torch.Generator().manual_seed(int.from_bytes(key[:4], "little"))
        return torch.randint(0, 2, size, generator=generator, dtype=torch.int8).mul_(2).sub_(1).float()


class SketchedGradients(LinearGradients):
    """Gradients whose row and column scores are sketched if that is cheaper; everything else is exact.

    Args:
        gradients: of one batch.
        sketch: of the pass.
        samples: the numbers of the batch's samples.
        name: module path. The children of a module have the same signs for inputs of one width, so that they share
            projections if they share the input (q, k, v; gate, up).
    """

    def __init__(self, gradients: LinearGradients, sketch: Sketch, samples: Sequence[int], name: str):
        super().__init__(gradients.x, gradients.g, gradients.gram)
        self.sketch, self.samples, self.name = sketch, samples, name

    def row_scores(self) -> Tensor:
        (_, positions, inputs), outputs, shared = self.x.shape, self.g.shape[2], self.gram.shared_by
        if not sketch_is_cheaper(positions, outputs, inputs, self.sketch.size, shared):
            return super().row_scores()
        parent = self.name.rpartition(".")[0]
        return _lengths(self.g, self.sketch.project(self.x, parent, self.samples, remember=shared > 1))

    def column_scores(self) -> Tensor:
        (_, positions, inputs), outputs = self.x.shape, self.g.shape[2]
        if not sketch_is_cheaper(positions, inputs, outputs, self.sketch.size):
            return super().column_scores()
        return _lengths(self.x, self.sketch.project(self.g, self.name, self.samples))


class SketchDigest(InputDigest):
    """The projections of an input ``[b, t, i]``, ``[t, r]`` for each sample; arguments as in ``SketchedGradients``."""

    def __init__(self, x: Tensor, sketch: Sketch, samples: Sequence[int], name: str):
        self.projected = sketch.project(x, name.rpartition(".")[0], samples)

    def row_scores(self, g):
        return _lengths(g, self.projected)


def _lengths(features: Tensor, projected: list[Tensor]) -> Tensor:
    """``[b, f]``: the mean over projections of the squares of ``features[b].mT @ projected[b]``."""
    products = [p.mT @ sample.to(p.dtype) for sample, p in zip(features, projected, strict=True)]
    return torch.stack([product.square_().mean(0) for product in products])

"""Row and column scores from a few random projections: at the default of 16 no dearer than the exact ones.

The squared length of a gradient's row ``v`` ``[i]`` is estimated by ``|v @ S| ** 2 / r`` with random signs ``S``
``[i, r]``. That is unbiased, as ``S @ S.mT / r`` is the identity on average, and ``v @ S`` needs no gradient matrix:
``g.mT @ (x @ S)``. Columns are the same with x and g exchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .per_sample import InputDigest, LinearGradients, gram_is_cheaper, same_memory


def sketch_is_cheaper(positions: int, outputs: int, inputs: int, size: int, shared_by: int = 1) -> bool:
    """Whether ``size`` projections for row scores take fewer operations than the cheaper exact form.

    Per sample and layer these are ``r * (t * i / shared_by + t * o)``, against ``t`` in the place of ``r`` for the Gram
    form, or ``t * o * i``. For column scores exchange inputs and outputs.
    """
    if gram_is_cheaper(positions, outputs, inputs, shared_by):
        return size < positions
    return size * (inputs / shared_by + outputs) < outputs * inputs


class Sketch:
    """Random signs for every sample and place of a pass, the same whatever else is in the batch or on the model.

    A table of signs for each width, whose rows are flipped by signs of the sample's and the place's own: errors are
    then uncorrelated between samples, as with a table of their own, which would take ``r`` times as long to draw.
    All are drawn on the CPU, by generators of their own.

    Args:
        size: ``r``, how many projections.
        seed: of all that is drawn.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._tables: dict[tuple[int, torch.device], Tensor] = {}
        self._last: tuple[Tensor, str, Sequence[int], list[Tensor]] | None = None

    def project(self, x: Tensor, place: str, samples: Sequence[int], remember: bool = False) -> list[Tensor]:
        """``x[b] @ S[b]`` of each sample, ``[t, r]``, in float32 at least.

        Args:
            x: ``[b, t, f]``.
            place: where in the model it stands.
            samples: the numbers of its samples.
            remember: other layers will ask for the same.
        """
        last = self._last
        if last is not None and same_memory(last[0], x) and last[1:3] == (place, samples):
            return last[3]
        table, flips = self._table(x.shape[2], x.device), self._flips(place, samples, x.shape[2]).to(x.device)
        wide = torch.promote_types(x.dtype, torch.float32)
        # sample by sample: what is widened or drawn for all at once would take as much memory as x, or more
        projected = [sample.to(wide) @ (flip[:, None] * table).to(wide) for sample, flip in zip(x, flips, strict=True)]
        self._last = (x, place, samples, projected) if remember else None
        return projected

    def forget(self) -> None:
        """Let go of what is remembered."""
        self._last = None

    def _table(self, width: int, device: torch.device) -> Tensor:
        if (width, device) not in self._tables:
            self._tables[width, device] = self._signs(f"table {width}", width, self.size).to(device)
        return self._tables[width, device]

    def _flips(self, place: str, samples: Sequence[int], width: int) -> Tensor:
        return torch.stack([self._signs(f"{sample} {place}", width) for sample in samples])

    def _signs(self, purpose: str, *size: int) -> Tensor:
        key = hashlib.blake2b(f"{self.seed} {purpose}".encode(), digest_size=8).digest()
        # torch's generator on the CPU takes in no more than 32 bits
        generator = torch.Generator().manual_seed(int.from_bytes(key[:4], "little"))
        return torch.randint(0, 2, size, generator=generator, dtype=torch.int8).mul_(2).sub_(1).float()


class SketchedGradients(LinearGradients):
    """Gradients whose row and column scores are sketched where that is cheaper; all else is exact.

    Args:
        gradients: of one batch.
        sketch: of the pass.
        samples: the numbers of the batch's samples.
        name: module path. Modules of one parent have the same signs for inputs of one width, and so share the
            projections where they share the input (q, k, v; gate, up).
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
    """The projections of an input, ``[t, r]`` for each sample: what sketched row scores need of it.

    Args:
        x: layer input, ``[b, t, i]``.
        sketch, samples, name: as ``SketchedGradients`` has them.
    """

    def __init__(self, x: Tensor, sketch: Sketch, samples: Sequence[int], name: str):
        self.projected = sketch.project(x, name.rpartition(".")[0], samples)

    def row_scores(self, g):
        return _lengths(g, self.projected)


def _lengths(features: Tensor, projected: list[Tensor]) -> Tensor:
    """``[b, f]``: the mean over projections of the squares of ``features[b].mT @ projected[b]``."""
    products = [p.mT @ sample.to(p.dtype) for sample, p in zip(features, projected, strict=True)]
    return torch.stack([product.square_().mean(0) for product in products])

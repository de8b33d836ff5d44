"""The loss over the global batch, exact and in tiles: no rank ever holds a similarity matrix.

Letters: b pairs on this rank, B pairs on all ranks, R ranks (B = R b), v and V the valid ones among b and B,
d dimensions of the joint space.

Each rank compares its images with the texts of all ranks, TILE x TILE similarities at a time, and forgets each tile;
backward computes the tiles once more. What is kept grows with B d and not with b B. Contrastive needs the sum over
every row and over every column of exponentials: a row lies on one rank, a column is summed across ranks, so each
similarity is computed once and serves both directions.

**What a rank returns, and why the gradients come out right.** With ``l_i`` the loss of pair i and V the number of
valid pairs of the global batch (bad samples are left out as rows and as columns), the loss is ``L = (1/V) sum_i l_i``.
Rank r returns ``L_r = (R/V) sum_{i of r} l_i``, so that

- the mean over ranks is the loss: ``(1/R) sum_r L_r = L``; without bad samples ``L_r`` is the mean over r's pairs;
- so is the gradient, after ZeRO has averaged it. Backward gives the features ``x_r`` of rank r the sum over ranks
  ``sum_s dL_s/dx_r``, WITHOUT any division, and so the parameters ``sum_s dL_s/dx_r dx_r/dw``. The average over r is
  ``(1/R) sum_s sum_r dL_s/dx_r dx_r/dw = d/dw (1/R) sum_s L_s = dL/dw``. For scale and bias rank r keeps what its
  own images contribute; the average is right too. Adam hides a wrong factor here; gradient norms show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from longclip.train.ranks import Ranks

TILE = 2048
"""rows and columns of a tile: 16 MiB, of which about four are alive at a time"""


def contrastive_loss(
    image_bd: Tensor, text_bd: Tensor, scale: Tensor, ranks: Ranks, valid_b: Tensor | None = None
) -> Tensor:
    """This rank's share of the symmetric InfoNCE loss (Radford et al. 2021, arXiv 2103.00020, figure 3) over B pairs.

    ``image_bd`` and ``text_bd`` are features of unit length, b the same on all ranks; ``scale`` is one number (any
    shape) that multiplies the similarities, the inverse of the temperature; ``valid_b`` is a bool mask, false for bad
    samples (whose features must be finite all the same), given on all ranks or on none. ``l_i`` is the mean of pair
    i's two cross-entropies, image -> all texts and text -> all images.

    Returns a scalar in fp32; 0 where no pair at all is valid. Collective, and so is backward, which wants the same
    upstream gradient on all ranks.
    """
    return _in_tiles(_Contrastive(), image_bd, text_bd, scale, torch.zeros_like(scale), ranks, valid_b)


def sigmoid_loss(
    image_bd: Tensor, text_bd: Tensor, scale: Tensor, bias: Tensor, ranks: Ranks, valid_b: Tensor | None = None
) -> Tensor:
    """This rank's share of the sigmoid loss (Zhai et al. 2023, arXiv 2303.15343, algorithm 1) over B pairs.

    ``l_i`` is the sum over all texts j of ``log(1 + exp(-z (scale x_i y_j + bias)))``, z = 1 for i's own text and -1
    for the others. ``bias`` is one number (any shape); everything else is as in :func:`contrastive_loss`.
    """
    return _in_tiles(_Sigmoid(), image_bd, text_bd, scale, bias, ranks, valid_b)


LOSSES: dict[str, Callable[..., Tensor]] = {"contrastive": contrastive_loss, "sigmoid": sigmoid_loss}
"""By ``train.loss``; called with the model's outputs, then ``ranks`` and ``valid_b``."""


@dataclass(frozen=True)
class _Tile:
    rows: slice
    columns: slice
    logits: Tensor
    offset: int
    """of the diagonal on which the pairs lie, as ``torch.diagonal`` counts; outside the tile where it has no pairs"""

    def pairs(self, values: Tensor) -> Tensor:
        """View of the entries of ``values`` (of the tile's shape) that are pairs."""
        return values.diagonal(self.offset)

    @property
    def paired(self) -> slice:
        """The rows that have their pair in this tile."""
        start = self.rows.start + max(0, -self.offset)
        return slice(start, start + len(self.pairs(self.logits)))


@dataclass(frozen=True)
class _Strip:
    """This rank's valid images against the valid texts of all ranks."""

    image_vd: Tensor
    text_Vd: Tensor
    scale: Tensor
    bias: Tensor
    first: int
    """place of this rank's first pair among the V"""

    @property
    def own(self) -> slice:
        return slice(self.first, self.first + len(self.image_vd))

    def tiles(self) -> Iterator[_Tile]:
        v, V = len(self.image_vd), len(self.text_Vd)
        for top in range(0, v, TILE):
            rows = slice(top, min(v, top + TILE))
            scaled = self.scale * self.image_vd[rows]
            for left in range(0, V, TILE):
                columns = slice(left, min(V, left + TILE))
                logits = torch.addmm(self.bias, scaled, self.text_Vd[columns].T)
                yield _Tile(rows, columns, logits, self.first + top - left)


class _Kind(Protocol):
    """What is done with the logits."""

    def value(self, strip: _Strip) -> Tensor:
        """``sum_i l_i`` over this rank's pairs. Collective."""

    def slope(self, tile: _Tile) -> Tensor:
        """Derivative of ``sum_i l_i`` over ALL ranks' pairs by the tile's logits; after ``value``."""


class _Contrastive:
    """Keeps the log-sum-exp of each row and column between the passes."""

    row_v: Tensor
    column_V: Tensor

    def value(self, strip: _Strip) -> Tensor:
        row_v = strip.image_vd.new_full((len(strip.image_vd),), float("-inf"))
        column_V = strip.image_vd.new_full((len(strip.text_Vd),), float("-inf"))
        own_v = torch.zeros_like(row_v)
        for tile in strip.tiles():
            row_v[tile.rows] = torch.logaddexp(row_v[tile.rows], tile.logits.logsumexp(1))
            column_V[tile.columns] = torch.logaddexp(column_V[tile.columns], tile.logits.logsumexp(0))
            # From the tile, not from a product of its own: where a pair dominates, rounding cancels.
            own_v[tile.paired] = tile.pairs(tile.logits)
        top_V = column_V.clone()
        dist.all_reduce(top_V, dist.ReduceOp.MAX)
        sum_V = (column_V - top_V).exp()
        dist.all_reduce(sum_V)
        self.row_v, self.column_V = row_v, top_V + sum_V.log()
        return ((row_v - own_v).sum() + (self.column_V[strip.own] - own_v).sum()) / 2

    def slope(self, tile: _Tile) -> Tensor:
        slope = (tile.logits - self.row_v[tile.rows, None]).exp_()
        slope += tile.logits.sub_(self.column_V[tile.columns]).exp_()
        slope /= 2
        tile.pairs(slope).sub_(1)
        return slope


class _Sigmoid:
    def value(self, strip: _Strip) -> Tensor:
        total = strip.image_vd.new_zeros((), dtype=torch.float64)  # of V x v terms, most of them small
        for tile in strip.tiles():
            tile.pairs(tile.logits).neg_()
            total += functional.softplus(tile.logits).sum()
        return total.float()

    def slope(self, tile: _Tile) -> Tensor:
        tile.pairs(tile.logits).neg_()
        slope = tile.logits.sigmoid_()
        tile.pairs(slope).neg_()
        return slope


def _in_tiles(
    kind: _Kind,
    image_bd: Tensor,
    text_bd: Tensor,
    scale: Tensor,
    bias: Tensor,
    ranks: Ranks,
    valid_b: Tensor | None,
) -> Tensor:
    image_bd, text_bd = image_bd.float(), text_bd.float()
    scale, bias = scale.float().reshape(()), bias.float().reshape(())
    loss: Tensor = _InTiles.apply(image_bd, text_bd, scale, bias, kind, ranks, valid_b)  # type: ignore[no-untyped-call]
    return loss


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_bd: Tensor,
        text_bd: Tensor,
        scale: Tensor,
        bias: Tensor,
        kind: _Kind,
        ranks: Ranks,
        valid_b: Tensor | None,
    ) -> Tensor:
        text_Bd, b = all_rows(text_bd, ranks), len(text_bd)
        valid_B = None if valid_b is None else all_rows(valid_b, ranks)
        if valid_b is None or valid_B is None or bool(valid_B.all()):
            valid_b = valid_B = None
            strip = _Strip(image_bd, text_Bd, scale, bias, ranks.rank * b)
        else:
            first = int(valid_B[: ranks.rank * b].sum())
            strip = _Strip(image_bd[valid_b], text_Bd[valid_B], scale, bias, first)
        ctx.kind, ctx.ranks, ctx.first = kind, ranks, strip.first
        ctx.weight = ranks.size / max(1, len(strip.text_Vd))
        ctx.save_for_backward(strip.image_vd, strip.text_Vd, scale, bias, valid_b, valid_B)
        loss: Tensor = ctx.weight * kind.value(strip)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image_vd, text_Vd, scale, bias, valid_b, valid_B = ctx.saved_tensors
        strip = _Strip(image_vd, text_Vd, scale, bias, ctx.first)
        d_image_vd, d_text_Vd = torch.zeros_like(image_vd), torch.zeros_like(text_Vd)
        d_bias = torch.zeros_like(bias)
        for tile in strip.tiles():
            slope = ctx.kind.slope(tile)
            d_image_vd[tile.rows].addmm_(slope, text_Vd[tile.columns])
            d_text_Vd[tile.columns].addmm_(slope.T, image_vd[tile.rows])
            d_bias += slope.sum()
        weight = grad * ctx.weight
        d_scale = weight * (d_image_vd * image_vd).sum()
        d_image_vd *= weight * scale
        d_text_Vd *= weight * scale
        d_image_bd, d_text_Bd = _spread(d_image_vd, valid_b), _spread(d_text_Vd, valid_B)
        return d_image_bd, own_rows(d_text_Bd, ctx.ranks), d_scale, weight * d_bias, None, None, None


def _spread(x_vd: Tensor, valid_b: Tensor | None) -> Tensor:
    """Zeros for the rows that were left out."""
    if valid_b is None:
        return x_vd
    x_bd = torch.zeros(len(valid_b), x_vd.shape[1], dtype=x_vd.dtype, device=x_vd.device)
    x_bd[valid_b] = x_vd
    return x_bd


def all_rows(x_bd: Tensor, ranks: Ranks) -> Tensor:
    """Rows of all ranks, in the order of ranks: ``[b, ...]`` -> ``[B, ...]``. Collective."""
    x_Bd = x_bd.new_empty((ranks.size * x_bd.shape[0], *x_bd.shape[1:]))
    dist.all_gather_into_tensor(x_Bd, x_bd.contiguous())
    return x_Bd


def own_rows(x_Bd: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks of what they hold for this rank's rows: ``[B, ...]`` -> ``[b, ...]``. Collective."""
    x_bd = x_Bd.new_empty((x_Bd.shape[0] // ranks.size, *x_Bd.shape[1:]))
    dist.reduce_scatter_tensor(x_bd, x_Bd.contiguous())
    return x_bd

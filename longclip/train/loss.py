"""The contrastive loss over the global batch, computed by every rank for its own rows only.

Letters: b pairs on this rank, B pairs on all ranks, R ranks (B = R b), d dimensions of the joint space.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from longclip.train.ranks import Ranks


class _Gather(torch.autograd.Function):
    """[b, d] of each rank -> [B, d] on all; the gradient is the sum over ranks of what each sends back."""

    @staticmethod
    def forward(ctx: Any, x_bd: Tensor, size: int) -> Tensor:
        ctx.size = size
        x_Bd = x_bd.new_empty((size * x_bd.shape[0], *x_bd.shape[1:]))
        dist.all_gather_into_tensor(x_Bd, x_bd.contiguous())
        return x_Bd

    @staticmethod
    def backward(ctx: Any, grad_Bd: Tensor) -> tuple[Tensor, None]:
        grad_bd = grad_Bd.new_empty((grad_Bd.shape[0] // ctx.size, *grad_Bd.shape[1:]))
        dist.reduce_scatter_tensor(grad_bd, grad_Bd.contiguous())
        return grad_bd, None


def gather(x_bd: Tensor, ranks: Ranks) -> Tensor:
    """Rows of all ranks, in the order of ranks: ``[b, d]`` -> ``[B, d]``, differentiable. Collective both ways.

    b must be the same on all ranks. The gradient is the SUM over ranks of the pieces that belong to this rank, without
    any division: see :func:`contrastive_loss` for why. Adam hides a wrong factor here; gradient norms show it.
    """
    x_Bd: Tensor = _Gather.apply(x_bd, ranks.size)  # type: ignore[no-untyped-call]
    return x_Bd


def contrastive_loss(
    image_bd: Tensor, text_bd: Tensor, scale: Tensor, ranks: Ranks, valid_b: Tensor | None = None
) -> Tensor:
    """This rank's share of the symmetric InfoNCE loss (Radford et al. 2021, arXiv 2103.00020, figure 3) over B pairs.

    ``image_bd`` and ``text_bd`` are features of unit length, ``scale`` one number that multiplies the similarities
    (the inverse of the temperature; any shape with one element), ``valid_b`` a bool mask, false for bad samples (whose
    features must be finite all the same), given on all ranks or on none. Returns a scalar in fp32. Collective: every
    rank must call it, and run backward.

    With ``l_i`` the mean of pair i's two cross-entropies (image -> all texts, text -> all images; bad samples are left
    out as rows and as columns) and ``V`` the number of valid pairs of the global batch, the full-batch loss is
    ``L = (1/V) sum_i l_i``. Rank r returns ``L_r = (R/V) sum_{i of r} l_i``, so that

    - the mean of the returned values is the loss: ``(1/R) sum_r L_r = L``; without bad samples ``R/V = 1/b`` and
      ``L_r`` is simply the mean over the rank's rows;
    - so is the gradient, after ZeRO has averaged it. With ``x_r`` the features that rank r computed, ``gather``'s
      backward gives rank r the sum over ranks ``sum_s dL_s/dx_r``, and so the parameters
      ``sum_s dL_s/dx_r dx_r/dw``. The average over r is ``(1/R) sum_s sum_r dL_s/dx_r dx_r/dw = d/dw (1/R) sum_s L_s
      = dL/dw``. ``scale`` does not go through ``gather``: rank r holds ``dL_r/dscale``, and the average is right too.

    Memory: two similarity matrices of b x B on each rank, never B x B. Where no pair at all is valid the loss is 0.
    """
    image_bd, text_bd, scale = image_bd.float(), text_bd.float(), scale.float().reshape(())
    i2t_bB = scale * image_bd @ gather(text_bd, ranks).T
    t2i_bB = scale * text_bd @ gather(image_bd, ranks).T
    b = image_bd.shape[0]
    own_b = ranks.rank * b + torch.arange(b, device=image_bd.device)
    if valid_b is None:
        weight = 1.0 / b
    else:
        valid_B = torch.empty(ranks.size * b, dtype=torch.bool, device=valid_b.device)
        dist.all_gather_into_tensor(valid_B, valid_b)
        i2t_bB = i2t_bB.masked_fill(~valid_B, float("-inf"))[valid_b]
        t2i_bB = t2i_bB.masked_fill(~valid_B, float("-inf"))[valid_b]
        own_b = own_b[valid_b]
        weight = ranks.size / max(1, int(valid_B.sum()))
    i2t = functional.cross_entropy(i2t_bB, own_b, reduction="sum")
    t2i = functional.cross_entropy(t2i_bB, own_b, reduction="sum")
    return weight * (i2t + t2i) / 2

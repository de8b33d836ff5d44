"""Text without padding: the captions of a batch run through the tower as one ragged sequence.

A transformers model sees a batch of one row, ``[1, T]`` with T the real tokens of all captions; an attention function
registered under the name ``packed`` keeps the captions apart. Everything else in a text tower (embeddings, norms,
linear layers) works token by token and never notices. Padding to the window is kept as the reference path
(``model/towers.py: TextEncoder.padded``) that packing is tested and measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED = "packed"


@dataclass(frozen=True)
class Packed:
    """Captions laid end to end, shortest first, so that equal lengths lie together and share one attention call."""

    ids_T: Tensor
    """token ids, int64, [T] with T = sum(lengths)"""
    lengths: tuple[int, ...]
    """tokens of each caption, ascending"""
    order: tuple[int, ...]
    """``order[i]`` is the place in the batch of the i-th caption"""

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> Packed:
        return replace(self, ids_T=self.ids_T.to(device, non_blocking=True))

    def positions_T(self) -> Tensor:
        """Position of each token in its caption, [T]."""
        return torch.cat([torch.arange(n) for n in self.lengths]).to(self.ids_T.device)

    def segments_T(self) -> Tensor:
        """Place in the batch of each token's caption, [T]."""
        places = torch.repeat_interleave(torch.tensor(self.order), torch.tensor(self.lengths))
        return places.to(self.ids_T.device)

    def groups(self) -> tuple[tuple[int, int], ...]:
        """Runs of equally long captions: ``(length, how many)``."""
        return tuple((length, len(list(run))) for length, run in groupby(self.lengths))

    def mean_BD(self, hidden_TD: Tensor) -> Tensor:
        """Mean over each caption's tokens in fp32, in batch order."""
        sums = hidden_TD.new_zeros(len(self), hidden_TD.shape[-1], dtype=torch.float32)
        sums = sums.index_add(0, self.segments_T(), hidden_TD.float())
        counts = torch.empty(len(self))
        counts[list(self.order)] = torch.tensor(self.lengths, dtype=torch.float32)
        return sums / counts.to(sums.device)[:, None]

    def first_BD(self, hidden_TD: Tensor) -> Tensor:
        """Each caption's first token, in batch order."""
        starts = torch.zeros(len(self), dtype=torch.long)
        starts[list(self.order)] = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
        return hidden_TD[starts.to(hidden_TD.device)].float()


def pack(captions: Sequence[Sequence[int]]) -> Packed:
    """Packs token ids; every caption has at least one token (tokenizers add their special ones to empty text)."""
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
    ids = torch.tensor([token for i in order for token in captions[i]], dtype=torch.long)
    return Packed(ids, tuple(len(captions[i]) for i in order), tuple(order))


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    groups: tuple[tuple[int, int], ...] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each caption; query, key and value are [1, heads, T, head_dim].

    ``sliding_window`` is flash attention's: positions at a distance below it see each other.
    """
    heads, head_dim = query.shape[1], query.shape[3]
    # One split, whose backward is one concatenation; slicing would make each group's backward as long as all of T.
    sizes = [length * count for length, count in groups]
    outputs = []
    parts = zip(groups, *(torch.split(x.squeeze(0), sizes, dim=1) for x in (query, key, value)), strict=True)
    for (length, count), *qkv_HTD in parts:
        q, k, v = (x.reshape(heads, count, length, head_dim).transpose(0, 1) for x in qkv_HTD)
        mask = None
        if sliding_window is not None and length > sliding_window:
            at = torch.arange(length, device=query.device)
            mask = (at[:, None] - at[None, :]).abs() < sliding_window
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        outputs.append(out.transpose(1, 2).reshape(1, length * count, heads, head_dim))
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(PACKED, _packed_attention)
# The boundaries are in `groups`; no mask is built.
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)

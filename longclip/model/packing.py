"""Text without padding: the captions of a batch run through the tower as one ragged sequence.

A transformers model sees a batch of one row, ``[1, T]`` with T the real tokens of all captions; an attention function
registered under the name ``packed`` keeps the captions apart. Everything else in a text tower (embeddings, norms,
linear layers) works token by token and never notices. Padding to the window is kept as the reference path
(``engine.text: padded``) that packing is tested and measured against.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from longclip.errors import SiteError

PACKED = "packed"


@dataclass(frozen=True)
class Bounds:
    """Where the captions of a packed batch begin and end."""

    groups: tuple[tuple[int, int], ...]
    """runs of equally long captions: ``(length, how many)``, lengths ascending; without the empty ones"""
    ends: Tensor
    """0, then the end of each caption: int32, [B + 1], where the tokens are"""


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
        return replace(self, ids_T=_sent(self.ids_T, device))

    def starts(self) -> list[int]:
        """Where each caption begins in ``ids_T``."""
        return [0, *accumulate(self.lengths)][:-1]

    def positions_T(self) -> Tensor:
        """Position of each token in its caption, [T]."""
        starts = torch.repeat_interleave(torch.tensor(self.starts()), torch.tensor(self.lengths))
        return _sent(torch.arange(len(self.ids_T)) - starts, self.ids_T.device)

    def segments_T(self) -> Tensor:
        """Place in the batch of each token's caption, [T]."""
        places = torch.repeat_interleave(torch.tensor(self.order), torch.tensor(self.lengths))
        return _sent(places, self.ids_T.device)

    def bounds(self) -> Bounds:
        """Where captions begin and end, in the two forms that attention wants."""
        groups = tuple((length, len(list(run))) for length, run in groupby(self.lengths) if length)
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return Bounds(groups, _sent(ends, self.ids_T.device))

    def digests(self) -> list[bytes]:
        """16 bytes for each caption, in batch order: the same where its tokens are. The tokens are on the CPU."""
        found = [b""] * len(self)
        for place, ids in zip(self.order, torch.split(self.ids_T, list(self.lengths)), strict=True):
            found[place] = blake2b(ids.numpy().tobytes(), digest_size=16).digest()
        return found

    def mean_BD(self, hidden_TD: Tensor) -> Tensor:
        """Mean over each caption's tokens in fp32, in batch order; of no tokens zero."""
        sums = hidden_TD.new_zeros(len(self), hidden_TD.shape[-1], dtype=torch.float32)
        sums = sums.index_add(0, self.segments_T(), hidden_TD.float())
        counts = torch.empty(len(self))
        counts[list(self.order)] = torch.tensor(self.lengths, dtype=torch.float32)
        return sums / _sent(counts.clamp(min=1), sums.device)[:, None]

    def first_BD(self, hidden_TD: Tensor) -> Tensor:
        """Each caption's first token in fp32, in batch order; where there is none zero."""
        return self._one_each(hidden_TD, self.starts())

    def last_BD(self, hidden_TD: Tensor) -> Tensor:
        """Each caption's last token in fp32, in batch order; where there is none zero."""
        return self._one_each(hidden_TD, [end - 1 for end in accumulate(self.lengths)])

    def _one_each(self, hidden_TD: Tensor, rows: list[int]) -> Tensor:
        empty = bisect_right(self.lengths, 0)
        at = _sent(torch.tensor([rows[empty:], self.order[empty:]], dtype=torch.long), hidden_TD.device)
        none = hidden_TD.new_zeros(len(self), hidden_TD.shape[-1], dtype=torch.float32)
        return none.index_copy(0, at[1], hidden_TD[at[0]].float())


def _sent(made: Tensor, device: torch.device) -> Tensor:
    """``made`` (on the CPU) on ``device``, without waiting until the GPU has done all that was asked of it before.

    CUDA has taken its own copy of pageable memory when the call returns, and what runs next finds it there.
    """
    return made.to(device, non_blocking=True)


def pack(captions: Sequence[Sequence[int]]) -> Packed:
    """Packs token ids; a caption may be empty."""
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
    ids = torch.tensor([token for i in order for token in captions[i]], dtype=torch.long)
    return Packed(ids, tuple(len(captions[i]) for i in order), tuple(order))


def runs_varlen(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> bool:
    """Whether attention is one launch for all captions: torch's varlen kernel, flash attention, is for that alone.

    It has no CPU kernel, takes 16-bit floats and heads of 8 to 256 in steps of 8 only, and knows no dropout.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256 and dropout == 0.0


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool = False,
    *,
    bounds: Bounds,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each caption; query, key and value are [1, heads, T, head_dim].

    ``sliding_window`` is flash attention's: positions at a distance below it see each other.
    """
    run = _varlen if runs_varlen(query.device, query.dtype, query.shape[-1], dropout) else _by_length
    return run(query, key, value, bounds, dropout, scaling, sliding_window, is_causal), None


def _by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Bounds,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    causal: bool,
) -> Tensor:
    """[1, T, heads, head_dim]: one call for all captions of a length, without a mask where there need be none."""
    heads, head_dim = query.shape[1], query.shape[3]
    # One split, whose backward is one concatenation; slicing would make each group's backward as long as all of T.
    sizes = [length * count for length, count in bounds.groups]
    outputs = []
    parts = zip(bounds.groups, *(torch.split(x.squeeze(0), sizes, dim=1) for x in (query, key, value)), strict=True)
    for (length, count), *qkv_HTD in parts:
        q, k, v = (x.reshape(heads, count, length, head_dim).transpose(0, 1) for x in qkv_HTD)
        mask = None
        if sliding_window is not None and length > sliding_window:
            at = torch.arange(length, device=query.device)
            mask = (at[:, None] - at[None, :]).abs() < sliding_window
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=causal
        )
        outputs.append(out.transpose(1, 2).reshape(1, length * count, heads, head_dim))
    return torch.cat(outputs, dim=1)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Bounds,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    causal: bool,
) -> Tensor:
    """[1, T, heads, head_dim] by flash attention over ragged sequences; 16-bit, CUDA, torch 2.11 or newer."""
    aside = -1 if sliding_window is None else sliding_window - 1
    longest = bounds.groups[-1][0]
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
    window = (aside, 0 if causal else aside)
    try:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, bounds.ends, bounds.ends, longest, longest, scale=scaling, window_size=window)
    except (ImportError, TypeError):  # before 2.10 there is none, and 2.10's knows no window (pytorch/pytorch#172238)
        raise SiteError(
            f"packed text on a GPU needs torch 2.11 or newer, this is {torch.__version__}", "or engine.text: padded"
        ) from None
    assert isinstance(out, Tensor)  # a pair only where asked for
    return out[None]


# Not compiled (engine.compile): it would be again for every batch, whose captions have other lengths.
AttentionInterface.register(PACKED, torch.compiler.disable(_packed_attention))  # type: ignore[no-untyped-call]
# The boundaries are in `bounds`; no mask is built.
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)

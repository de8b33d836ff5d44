"""Features of images and of texts, computed by all ranks together, one tower at a time.

What is to be embedded is cut into chunks of ``batch``, wherever the ranks are, and the chunks are dealt to the ranks in
turn: a chunk gives the same features on any number of ranks, bit for bit. Every rank runs a tower equally often (ZeRO-3
hangs otherwise); one that has run out does a chunk of one, which does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from longclip.data.loader import normalised
from longclip.data.tokens import Tokenizer
from longclip.experiment import kinds
from longclip.model.packing import pack
from longclip.model.towers import Pixels
from longclip.train.ranks import Ranks


@dataclass(frozen=True)
class Embedder:
    """A model ready to embed on all ranks. All methods are collective: every rank calls them with the same."""

    model: Callable[..., tuple[Tensor, ...]]
    """what is called: the DeepSpeed engine, or the model itself"""
    module: nn.Module
    """the :class:`longclip.model.clip.DualEncoder` in it"""
    tokenizer: Tokenizer
    """cuts to ``context_length``"""
    pixels: Pixels
    ranks: Ranks
    batch: int = 256
    """images or texts that a rank embeds at once"""
    alive: Callable[[], None] = lambda: None
    """called after every chunk"""

    @property
    def context_length(self) -> int:
        """The model's own window."""
        return self.tokenizer.context_length

    @property
    def reach(self) -> int:
        """The longest caption that the text tower takes, in tokens."""
        return kinds.reach(self.module.text.trunk.config.to_dict())  # type: ignore[union-attr, operator]

    def images(self, count: int, picture: Callable[[int], NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
        """Unit features [count, D] (fp32) and which images could be used, [count] bool; on every rank, on the CPU.

        ``picture(i)`` is image ``i`` as [size, size, 3] RGB, the size being that of ``pixels`` (data/decode.py makes
        such); it is called on one rank only (or for the first image on several), in rising order. Where it raises
        ValueError the image is not used, and its features mean nothing.
        """

        def chunk(span: range) -> tuple[Tensor, Tensor]:
            size = self.pixels.size
            made = np.zeros((len(span), size, size, 3), dtype=np.uint8)
            usable = torch.ones(len(span), dtype=torch.bool)
            for place, i in enumerate(span):
                try:
                    made[place] = picture(i)
                except ValueError:
                    usable[place] = False
            pixels_BCHW = normalised(torch.from_numpy(made), self.pixels, self.ranks.device)
            return self.model(pixels_BCHW, None)[0], usable

        return self._dealt(count, chunk)

    def texts(self, texts: Sequence[str], window: int | None = None) -> Tensor:
        """Unit features [N, D] (fp32) of texts cut to ``window`` tokens, by default the model's own; on every rank, on
        the CPU.

        Texts of the same tokens are embedded once: elsewhere in a batch they would differ in the last bit, and not tie.
        Raises ValueError where the tower does not reach so far.
        """
        if window is not None and window > self.reach:
            raise ValueError(f"the text tower has {self.reach} positions")
        tokenizer = self.tokenizer if window is None else self.tokenizer.cut_to(window)

        places, firsts = _distinct(tokenizer, texts, self.batch)

        def chunk(span: range) -> tuple[Tensor, Tensor]:
            ids, _ = tokenizer([texts[firsts[k]] for k in span])
            features = self.model(None, pack(ids).to(self.ranks.device))[0]
            return features, torch.ones(len(span), dtype=torch.bool)

        features_KD = self._dealt(len(firsts), chunk)[0]
        return features_KD if len(firsts) == len(texts) else features_KD[places]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has in full, special ones included."""
        size = self.ranks.size
        mine = self.tokenizer(texts[self.ranks.rank :: size])[1] if len(texts) > self.ranks.rank else []
        parts = self.ranks.gather(mine)
        return [parts[i % size][i // size] for i in range(len(texts))]

    def _dealt(self, count: int, chunk: Callable[[range], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """``chunk`` of each span of ``batch``, spans dealt in turn: features [count, D] and flags [count] of all."""
        starts = range(0, count, self.batch)
        features_ND, flags_N = torch.empty(count, 0), torch.zeros(count, dtype=torch.bool)
        with self._evaluating():
            for turn in range(0, len(starts), self.ranks.size):
                mine = turn + self.ranks.rank
                start = starts[mine] if mine < len(starts) else 0
                stop = min(count, start + self.batch) if mine < len(starts) else 1
                features_bD, flags_b = chunk(range(start, stop))
                if not turn:
                    features_ND = torch.empty(count, features_bD.shape[1])
                for part, (features, flags) in enumerate(self._of_all(features_bD, flags_b)):
                    if turn + part < len(starts):
                        at = starts[turn + part]
                        rows = min(self.batch, count - at)
                        features_ND[at : at + rows], flags_N[at : at + rows] = features[:rows], flags[:rows]
                self.alive()
        return features_ND, flags_N

    def _of_all(self, features_bD: Tensor, flags_b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """This turn's chunk of every rank, filled up to ``batch`` rows."""
        if self.ranks.size == 1:
            return [(features_bD, flags_b)]
        rows, dim = features_bD.shape
        sent_BF = torch.zeros(self.batch, dim + 1, device=self.ranks.device)
        sent_BF[:rows, :dim], sent_BF[:rows, dim] = features_bD, flags_b.to(self.ranks.device).float()
        all_RBF = torch.empty(self.ranks.size * self.batch, dim + 1, device=self.ranks.device)
        dist.all_gather_into_tensor(all_RBF, sent_BF)
        return [(part[:, :dim].cpu(), part[:, dim].cpu() > 0) for part in torch.split(all_RBF, self.batch)]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(was_training)


def _distinct(tokenizer: Tokenizer, texts: Sequence[str], batch: int) -> tuple[list[int], list[int]]:
    """Which of the distinct token sequences each text is, and the first text of each of them."""
    seen: dict[bytes, int] = {}
    places: list[int] = []
    firsts: list[int] = []
    for start in range(0, len(texts), batch):
        for i, ids in enumerate(tokenizer(texts[start : start + batch])[0], start):
            places.append(seen.setdefault(np.array(ids, dtype=np.int32).tobytes(), len(firsts)))
            if places[-1] == len(firsts):
                firsts.append(i)
    return places, firsts

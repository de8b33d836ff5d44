"""Two-pass cached gradients (Gao et al. 2021, arXiv 2101.06983): more pairs at once than there is memory for.

Activations are what does not fit; features do. So a step over ``count`` micro-batches runs the towers twice:

1. every micro-batch without a graph, for its features; then the loss over all features of all ranks, and its gradient
   with respect to this rank's features;
2. every micro-batch again, with a graph, and backward from ``<features, their gradient>``.

The sum over micro-batches is the gradient of the loss over the global batch. Accumulating the losses of the
micro-batches instead would compare each pair with its own micro-batch only: another experiment. The price is one more
forward.

``count`` is the same on all ranks, so that all ranks run the towers equally often (ZeRO-3 hangs otherwise). A
micro-batch has b / count pairs, dealt by length so that all have about the same number of tokens; which micro-batch a
pair is in does not change the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longclip.data.loader import Batch
from longclip.train.ranks import Ranks


def backward(engine: Any, part: Batch, loss: Callable[..., Tensor], count: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """This rank's loss on ``part``, detached, and the scale of the logits; the gradients are in ``engine``. Collective.

    ``loss`` is one of :data:`longclip.train.loss.LOSSES`. ``engine`` accumulates over ``count`` steps; it has taken
    all but the last, which is the caller's. Where dropout is on, the second pass draws what the first one drew.
    """
    places, micros = deal(part, count)

    def run(micro: Batch) -> Any:
        return engine(micro.images(ranks.device), micro.text.to(ranks.device))

    drawn, outputs = [], []
    with torch.no_grad():
        for micro in micros:
            drawn.append(_random_state(ranks.device))
            outputs.append(run(micro))
    images, texts, *numbers = zip(*outputs, strict=True)
    # Temperature and bias are the same number in every micro-batch; each carries its share of the gradient back.
    features = [torch.cat(images), torch.cat(texts), *(number[0] for number in numbers)]
    leaves = [feature.detach().requires_grad_() for feature in features]
    value = loss(*leaves, ranks, part.valid[places].to(ranks.device))
    value.backward()  # type: ignore[no-untyped-call]
    pulls = [
        *(leaf.grad.chunk(count) for leaf in leaves[:2] if leaf.grad is not None),
        *([leaf.grad / count] * count for leaf in leaves[2:] if leaf.grad is not None),
    ]
    for k, (micro, state, *pull) in enumerate(zip(micros, drawn, *pulls, strict=True)):
        _replay(state, ranks.device)
        again = run(micro)
        surrogate = sum(((output * grad).sum() for output, grad in zip(again, pull, strict=True)), value.new_zeros(()))
        engine.backward(surrogate, scale_wrt_gas=False)
        if k < count - 1:
            engine.step()  # counts the micro-batch; the weights stay
    return value.detach(), leaves[2].detach()


def deal(part: Batch, count: int) -> tuple[Tensor, list[Batch]]:
    """``part`` as ``count`` micro-batches of equal size, which has to divide.

    Captions are dealt in turn from the shortest to the longest. Also returns where in ``part`` each pair was, in the
    order of the micro-batches laid end to end, [b].
    """
    text = part.text
    captions = torch.split(text.ids_T, list(text.lengths))
    places, micros = [], []
    for k in range(count):
        mine = slice(k, None, count)
        place = torch.tensor(text.order[mine])
        places.append(place)
        order = tuple(range(len(place)))
        packed = replace(text, ids_T=torch.cat(captions[mine]), lengths=text.lengths[mine], order=order)
        micros.append(replace(part, pixels=part.pixels[place], text=packed))
    return torch.cat(places), micros


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _replay(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)

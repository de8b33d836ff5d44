"""Memory that a rank needs at its peak, from the shape of the model: what DeepSpeed, AdamW and autograd hold, when.

Two moments compete: the end of the backward pass, when the gradients stand, and the optimizer's step, when there are
their fp32 copies and AdamW's temporaries. n parameters, w bytes each (4, or 2 in bf16), R ranks; as DeepSpeed 0.19
allocates them (runtime/zero/stage_1_and_2.py, stage3.py) with its default buckets:

    stage   weights    optimizer (fp32)     backward adds                     step adds
    0       4n         8n                   gradients 4n, bucket              gradients 4n, AdamW
    1, 2    wn         12n/R                bucket, its reduction             bucket, copies of gradients, AdamW
    3       wn/R       12n/R + wn/R         bucket, its reduction, gathered   bucket, their copies, AdamW
                                            weights wn, gradients wn

(The bucket outlives the backward pass: gradients are views of it until the last group of parameters has been updated.)

Activations are what autograd keeps for the backward pass of ``model/towers.py``'s modules, in multiples of a layer's
width and of its MLP's; a test counts them. On a GPU bf16 takes the same ones, but attention is one fused launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longclip.model.shape import Shape, Tower

BUCKET = 5 * 10**8
"""elements; DeepSpeed's ``reduce_bucket_size``"""
TILE = 2048
"""rows and columns of the similarities that stand at once (train/loss.py)"""
CPU_LIBRARIES = 60 * 2**20
"""bytes that torch's and oneDNN's kernels take in the first step; measured"""
GPU_LIBRARIES = 2**30
"""bytes of the CUDA context, NCCL's buffers and cuBLAS's workspaces; of the usual size, not measured here"""
HEAP = 32 * 2**20
"""bytes up to which glibc takes an allocation from its heap, and keeps it when it is freed (mallopt(3),
M_MMAP_THRESHOLD)"""
HOLES = 1 / 3
"""share of that which nothing else fits into later; measured"""
SAVED = {
    "vit": (8, 2),
    "clip_vision_model": (8, 2),
    "siglip_vision_model": (8, 2),
    "clip_text_model": (9, 2),
    "bert": (9, 2),
    "roberta": (9, 2),
    "xlm-roberta": (9, 2),
    "modernbert": (11, 4),
}
"""widths, and MLP widths, that a layer keeps of a token: inputs of norms and matrices, q, k, v, attention's output"""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. ``peak`` is not their sum: not everything stands at once."""

    weights: int
    optimizer: int
    """fp32 weights (where there are others), Adam's two moments"""
    gradients: int
    """at the end of the backward pass, with the buckets of their exchange"""
    step: int
    """what the optimizer's step needs beyond weights and states"""
    activations: int
    loss: int
    inputs: int
    libraries: int
    peak: int


def memory(
    shape: Shape,
    lengths: Sequence[int],
    *,
    micro_batch: int,
    global_batch: int,
    precision: str,
    stage: int,
    ranks: int,
    checkpointing: bool,
    on_gpu: bool,
    offload: bool = False,
) -> Memory:
    """Of one rank that runs ``micro_batch`` pairs at once, whose captions have ``lengths`` tokens on average.

    ``lengths`` stands for the dataset's captions.
    """
    n, w = shape.total, 2 if precision == "bf16" else 4
    weights, optimizer, gradients, step = _by_stage(n, shape.trained, w, stage, ranks, on_gpu, shape.text.largest)
    if offload and on_gpu:  # to the node's memory, and with it the step
        optimizer = step = 0
    kept, largest = _activations(shape, lengths, micro_batch, w, checkpointing, on_gpu)
    share = global_batch // ranks
    features = 4 * shape.embed_dim * (global_batch + 3 * share) * 2
    tile = min(TILE, share) * min(TILE, global_batch)
    loss = features + 4 * 4 * tile
    # The share waits as bytes, a micro-batch is made fp32; what that is cast to is among the activations.
    inputs = 3 * shape.image.pixels * (share + 4 * micro_batch)
    libraries = GPU_LIBRARIES if on_gpu else CPU_LIBRARIES
    holes = bucket = late = 0
    if on_gpu:  # the allocator joins what is free; DeepSpeed takes its bucket whole when the backward pass begins
        bucket = w * BUCKET if stage else 0
    else:
        small = n - _above_heap(shape)
        holes = kept if largest < HEAP else 0
        holes += int(HOLES * 4 * small) if stage else 0  # of the fp32 weights, which stages above 0 copy away
        late = w * small if stage == 3 and ranks > 1 else 0  # of the weights gathered for the backward pass
    if micro_batch < share:  # the second pass runs micro-batches while gradients of earlier ones stand
        holes, bucket = max(holes, kept), max(bucket, gradients)
    standing = weights + optimizer + inputs + libraries
    peak = standing + max(kept + loss + bucket, holes + gradients, holes + late + step)
    return Memory(weights, optimizer, gradients, step, kept, loss, inputs, libraries, peak)


def _by_stage(
    n: int, trained: int, w: int, stage: int, ranks: int, on_gpu: bool, largest: int
) -> tuple[int, int, int, int]:
    """Weights, optimizer states, what the backward pass adds, what the step adds; bytes. Of ``n`` some are trained."""
    part = -(-trained // ranks)
    reduced = w * min(trained, BUCKET)
    bucket = w * BUCKET if on_gpu else reduced  # on a CPU pages are taken when they are touched
    # torch's AdamW makes two temporaries of a tensor, one tensor after the other; fused, on a GPU, none.
    adam = 0 if on_gpu else 8
    if stage == 0:
        return 4 * n, 8 * trained, 4 * trained + reduced, 4 * trained + adam * largest
    copies = 4 if w == 4 else w + 4  # bf16 gradients are laid end to end first
    if stage < 3:
        return w * n, 12 * part, bucket + reduced, bucket + (copies + adam) * part
    reduction = reduced if ranks > 1 else 0
    gathered = w * (n + trained) + reduction
    return w * -(-n // ranks), (12 + w) * part, bucket + gathered, bucket + (copies + adam) * part


def _above_heap(shape: Shape) -> int:
    """Elements of parameters that have a mapping of their own: the table of tokens, where it is that large."""
    return shape.text.largest if 4 * shape.text.largest >= HEAP else 0


def _activations(
    shape: Shape, lengths: Sequence[int], micro_batch: int, w: int, checkpointing: bool, on_gpu: bool
) -> tuple[int, int]:
    """Bytes that stand at the end of the forward pass (or in the backward pass, recomputing); the largest of them."""
    mean = sum(lengths) / len(lengths)
    squares = sum(n * n for n in lengths) / len(lengths)
    image, text = shape.image, shape.text
    of_image = kept_by(image, micro_batch * image.tokens, image.tokens, w, checkpointing, on_gpu)
    of_text = kept_by(text, micro_batch * mean, squares / mean, w, checkpointing, on_gpu)
    wide = max(
        micro_batch * image.tokens * image.inner,
        micro_batch * mean * text.inner * (2 if text.gated else 1),
    )
    return int(of_image + of_text), int(wide * w)


def kept_by(tower: Tower, tokens: float, seen: float, w: int, checkpointing: bool, on_gpu: bool) -> float:
    """Bytes that autograd keeps of ``tokens`` tokens; ``seen``: positions that one attends to, on average."""
    widths, inner = SAVED[tower.kind]
    if tower.activation == "quick_gelu":  # x * sigmoid(1.702 x) keeps the sigmoid too
        inner += 1
    layer: float = w * (widths * tower.width + inner * tower.inner) + 4 * tower.heads
    if tower.dropout:
        # Masks of two branches; attention that drops is not fused on a CPU, and keeps its scores in fp32, three times.
        layer += 2 * w * tower.width + (0 if on_gpu else 12 * tower.heads * seen)
    around = w * (3 * tower.width + tower.patch)
    trained = tower.layers - tower.frozen
    if checkpointing:
        # Of one layer at a time all of it, and its gradients beside it.
        return tokens * (around + trained * w * tower.width + 2 * min(trained, 1) * layer)
    return tokens * (around + trained * layer)

"""DeepSpeed around a model: its configuration, the optimizer, one step, and the learning rate.

What is easily got wrong here changes an experiment in silence, and is therefore spelled out: the batch arithmetic
(DeepSpeed accumulates over the micro-batches of a step, whose gradients come from the loss over all of them, see
``cached.py``; never over losses, which would shrink the negatives), gradient clipping (1.0 in DeepSpeed when absent)
the gradient norm (before clipping, at every ZeRO stage), and the bound on the scale of the logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic_core import PydanticCustomError
from torch import nn

from longclip.errors import UserError
from longclip.experiment.schema import Experiment, Train, check_batch
from longclip.model.clip import MAX_SCALE
from longclip.run.checkpoints import WEIGHTS
from longclip.train import masters
from longclip.train.ranks import Ranks


def deepspeed_config(experiment: Experiment, ranks_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for ``experiment`` on ``ranks_size`` processes.

    ``engine.deepspeed`` of the experiment is merged over it, key by key; the schema has refused those that are
    decided here. Raises UserError where the global batch does not divide among the ranks and micro-batches.
    """
    train = experiment.train
    try:
        share = check_batch(experiment, ranks_size)
    except PydanticCustomError as error:
        key, message = (error.context or {})["key"], (error.context or {})["message"]
        raise UserError(f"{key} {message}") from error
    micro_batch = share if experiment.engine.micro_batch == "auto" else experiment.engine.micro_batch
    config: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": share // micro_batch,
        "gradient_clipping": train.grad_clip,
        "zero_optimization": {"stage": experiment.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded or not, Adam is torch's
        "bf16": {"enabled": train.precision == "bf16"},
    }
    return _merge(config, experiment.engine.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def start(model: nn.Module, experiment: Experiment, ranks: Ranks) -> Any:
    """The DeepSpeed engine that trains ``model`` (fp32 parameters, none of them 0-dim) with AdamW. Collective.

    Weight decay is for matrices: one-dimensional parameters (norms, biases, the temperature) have none; frozen ones
    are not the optimizer's. Adam is torch's own (fused on CUDA), which needs no compiler at run time and does the same
    at every stage.
    """
    import deepspeed

    train = experiment.train
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=train.lr,
        betas=train.betas,
        eps=train.eps,
        fused=ranks.device.type == "cuda",
    )
    config = deepspeed_config(experiment, ranks.size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def step(engine: Any) -> float:
    """Update the weights after ``engine.backward``; the global gradient norm BEFORE clipping. Collective.

    Non-finite means that the run has diverged: DeepSpeed skips such a step at stages 1 to 3, and does not at stage 0.

    At stage 0 with fp32 DeepSpeed clips but keeps no norm (``engine.get_global_grad_norm()`` is None;
    deepspeed/runtime/engine.py:3502), so it is taken here; the gradients are averaged and whole on every rank by then.
    """
    norm = None
    if engine.zero_optimization_stage() == 0:
        norm = nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)


@torch.no_grad()
def bound_scale(engine: Any, scale: float) -> None:
    """After a step of the contrastive loss: a scale of the logits above its bound is set back to it. Collective.

    ``scale`` is what the step began with, the same on all ranks. Far below the bound nothing is read: a step moves the
    scale by a few learning rates, not by a factor of two.
    """
    if scale < MAX_SCALE / 2:
        return
    parameter = engine.module.log_scale
    value = masters.weight(engine, parameter)
    if float(value) > math.log(MAX_SCALE):
        masters.set_whole(engine, parameter, WEIGHTS, torch.full_like(value, math.log(MAX_SCALE)))
        if engine.zero_optimization_stage() in (1, 2):
            parameter.data.fill_(math.log(MAX_SCALE))  # the module's own copy


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """The rate of step number ``step`` (from 0) of ``total_steps``.

    It rises linearly from ``lr / warmup_steps`` to ``lr`` in ``warmup_steps`` steps, then stays, or falls as half a
    cosine that would reach 0 at step ``total_steps``.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(engine: Any, lr: float) -> None:
    """Use ``lr`` from the next step on, for all parameters."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = lr

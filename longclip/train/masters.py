"""Weights and Adam's moments as whole fp32 tensors, out of a DeepSpeed engine and into it, at any ZeRO stage.

    stage   fp32 weights                              Adam's state is keyed by
    0       the module's parameters                   the parameter
    1, 2    slices of one flat tensor a group, rank   that flat tensor
    3       slices of one flat tensor a sub group     that flat tensor

Frozen parameters have no moments, and no fp32 copy besides the module's own, in the precision that it computes in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longclip.run.checkpoints import MOMENTS, WEIGHTS


def tensors(engine: Any, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each parameter: its weight, or a moment if it has any. Collective at stages 1 to 3."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_moments(engine)
    for name, parameter in engine.module.named_parameters():
        if kind == WEIGHTS:
            yield name, weight(engine, parameter)
        elif parameter.requires_grad and engine.zero_optimization_stage() == 0:
            yield name, engine.basic_optimizer.state[parameter][kind].detach()
        elif parameter.requires_grad:
            yield name, safe_get_full_optimizer_state(parameter, kind).detach()


def weight(engine: Any, parameter: Any) -> Tensor:
    """One parameter's whole weight. Collective at stages 1 to 3."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if not parameter.requires_grad:
        with deepspeed.zero.GatheredParameters(parameter):  # does nothing below stage 3
            own: Tensor = parameter.detach().clone()
            return own
    whole: Tensor = parameter if engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param(parameter)
    return whole.detach()


@torch.no_grad()
def set_whole(engine: Any, parameter: Any, kind: str, value: Tensor) -> None:
    """Set one parameter's whole fp32 weight or moment. Collective at stage 3, for weights."""
    import deepspeed
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    stage = engine.zero_optimization_stage()
    if not parameter.requires_grad:
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.data.copy_(value)
    elif stage == 0:
        target = parameter if kind == WEIGHTS else engine.basic_optimizer.state[parameter][kind]
        target.copy_(value)
    elif stage < 3:
        if kind == WEIGHTS:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)
    else:
        # safe_set_full_* slices without padding and fails where the elements do not divide by the ranks
        part = parameter.ds_tensor.numel()
        padded = value.new_zeros(part * torch.distributed.get_world_size())
        padded[: value.numel()] = value.flatten()
        own = padded.narrow(0, part * torch.distributed.get_rank(), part)
        if kind == WEIGHTS:
            safe_set_local_fp32_param(parameter, own)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # the module's own copy
                parameter.data.copy_(value)
        else:
            safe_set_local_optimizer_state(parameter, own, kind)


def _masters(engine: Any) -> list[Tensor]:
    """The tensors that torch's AdamW really updates on this rank: its state is keyed by them."""
    if engine.zero_optimization_stage() == 3:  # its groups hold them during a step only
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in engine.basic_optimizer.param_groups for tensor in group["params"]]


def create_moments(engine: Any, step: int) -> None:
    """Adam's state at ``step``, still empty, as AdamW would make it on its first step. No batch is needed."""
    optimizer = engine.basic_optimizer
    on_device = bool(optimizer.defaults["fused"] or optimizer.defaults["capturable"])
    for master in _masters(engine):
        optimizer.state[master] = {
            "step": torch.tensor(float(step), device=master.device if on_device else "cpu"),
            **{moment: torch.zeros_like(master) for moment in MOMENTS},
        }
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Let the parameters of stages 1 and 2 see their slices of the flat moments.

    DeepSpeed does it once, after the first step of its first parameter group, when the others have no moments yet
    (deepspeed/runtime/zero/stage_1_and_2.py:2987), and reading theirs would fail.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def optimizer_step(engine: Any) -> int:
    return int(engine.basic_optimizer.state[_masters(engine)[0]]["step"])

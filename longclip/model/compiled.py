"""torch.compile for the layers of both towers (``engine.compile``)."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from longclip.errors import UserError

COMPILERS = ("c++", "g++", "gcc", "cc", "clang")
"""one of which torch (on CPUs) and Triton (on GPUs) call, besides those that CXX and CC name"""


def compile_layers(model: nn.Module) -> int:
    """Has torch compile the towers' layers when they first run; how many there are.

    Texts of any total length share what has been compiled: it is not done again for each, and nothing is padded to a
    few lengths. Attention of packed text stays out, as it is another program for every batch (model/packing.py).

    Raises:
        UserError: this machine has no compiler.
    """
    named = [os.environ[name] for name in ("CXX", "CC") if os.environ.get(name)]
    if not any(map(shutil.which, (*named, *COMPILERS))):
        raise UserError(
            f"engine.compile: no C or C++ compiler on {os.uname().nodename}",
            "load one in the site profile's `setup`, or engine.compile: false",
        )
    # All layers run through one function of transformers'; their kinds, in training and evaluation, would soon use up
    # how often torch compiles a function before it gives up.
    torch._dynamo.config.recompile_limit = 64
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)

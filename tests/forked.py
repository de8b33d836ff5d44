"""Ranks for tests that need no DeepSpeed: forked from one process, each as if on a node of its own, over gloo."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from longclip.train.ranks import Ranks


def fork_ranks(meeting: Path, nodes: Sequence[str], act: Callable[[Ranks], None]) -> list[int]:
    """Runs ``act`` on one rank for each of ``nodes``, which meet in the file ``meeting``; their exit codes.

    Call it from a process that has imported torch and done nothing else.
    """
    children = []
    for rank, node in enumerate(nodes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ["SLURMD_NODENAME"] = node
                dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=len(nodes))
                act(Ranks(rank, len(nodes), list(nodes[:rank]).count(node), torch.device("cpu")))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

"""What the libraries of a worker find in its environment."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# On the node, not under $HOME, which may be read-only on compute nodes, full, or a shared disk that a thousand ranks
# would write the same kernels to.
_CACHES = {
    "XDG_CACHE_HOME": "cache",  # torch's kernels and extensions (DeepSpeed's are among them), Hugging Face, matplotlib
    "TRITON_CACHE_DIR": "triton",  # else ~/.triton
    "CUDA_CACHE_PATH": "cuda",  # else ~/.nv
}


def before_torch(offline: bool = True) -> None:
    """What a worker sees to before torch is imported: its libraries' settings, and caches on its node.

    What the user has set stays, but for ``offline``: Hugging Face then never asks its hub, which nodes seldom reach.
    """
    folder = _private(Path(tempfile.gettempdir()) / f"longclip-{os.getuid()}")
    for name, place in _CACHES.items():
        os.environ.setdefault(name, str(folder / place))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _private(folder: Path) -> Path:
    """``folder``, shared by this user's jobs on the node; another one if somebody else has made it.

    Compiled code is loaded from there, so nobody else may be able to write to it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="longclip-"))
    return folder

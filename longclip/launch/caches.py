"""Where libraries keep what they compile and download while a worker runs: on its node, not under $HOME.

$HOME may be read-only on compute nodes, full, or a shared disk that a thousand ranks would write the same kernels to.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_CACHES = {
    "XDG_CACHE_HOME": "cache",  # torch's kernels and extensions (DeepSpeed's are among them), Hugging Face, matplotlib
    "TRITON_CACHE_DIR": "triton",  # else ~/.triton
    "CUDA_CACHE_PATH": "cuda",  # else ~/.nv
}


def leave_home_alone() -> None:
    """Points caches at this node's temporary folder, before torch is imported. What the user has set stays."""
    folder = _private(Path(tempfile.gettempdir()) / f"longclip-{os.getuid()}")
    for name, place in _CACHES.items():
        os.environ.setdefault(name, str(folder / place))


def _private(folder: Path) -> Path:
    """``folder``, shared by this user's jobs on the node; another one if somebody else has made it.

    Compiled code is loaded from there, so nobody else may be able to write to it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="longclip-"))
    return folder

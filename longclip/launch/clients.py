"""Slurm's own commands (squeue, sacct, sbatch, scancel, scontrol, sinfo, sacctmgr), as this package runs them."""

from __future__ import annotations

import os
import subprocess

from longclip.errors import SiteError

TIMEOUT = 20
"""seconds after which a question counts as not answered"""


def run(*command: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a client to its end, however it ends: one that changes something must not be cut off while it does.

    What the user's environment says to clients is left out (SQUEUE_PARTITION would hide jobs); to sbatch it is not.

    Raises:
        SiteError: it cannot be started, or gives no answer within ``timeout`` seconds.
    """
    filters = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(filters)}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except FileNotFoundError:
        raise SiteError(f"there is no {command[0]} on this machine", "do this on a login node of the cluster") from None
    except OSError as error:  # more arguments than the system takes, say
        raise SiteError(f"{command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise SiteError(f"{command[0]}: no answer within {timeout} s") from None


def ask(*command: str) -> str:
    """Output of a client that is asked something.

    Raises:
        SiteError: it cannot be started, fails, or does not answer within TIMEOUT; with its own words.
    """
    done = run(*command, timeout=TIMEOUT)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise SiteError(f"{' '.join(command[:3])}: {words[-1]}")
    return done.stdout

"""longclip: long-context image-text training sweeps on Slurm clusters."""

__version__ = "0.1.0"

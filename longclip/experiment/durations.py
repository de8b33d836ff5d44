"""How long and how often: intervals of training, and Slurm's time limits."""

from __future__ import annotations

import re

from longclip.experiment.section import bad

_INTERVAL = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(min|minutes?|epochs?|samples?|steps?)\s*$")


def parse_interval(text: str, key: str, units: tuple[str, ...]) -> tuple[float, str]:
    """``"15min"`` -> ``(15.0, "min")``; units are min, epoch, samples, steps."""
    match = _INTERVAL.match(text)
    if match:
        number = float(match[1])
        unit = next(u for u in ("min", "epoch", "samples", "steps") if u.startswith(match[2].rstrip("s")[:3]))
        if unit in units and number > 0:
            return number, unit
    raise bad(key, f"is {text!r}; valid is a number with one of {', '.join(units)}, such as '1 {units[0]}'")


_TIME = re.compile(r"^(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?$")


def parse_time(text: str) -> int:
    """Minutes of a Slurm time limit, rounded up.

    Forms are those of sbatch(1): ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``,
    ``days-hours:minutes``, ``days-hours:minutes:seconds``. So ``24:00`` is 24 minutes, not a day.
    """
    match = _TIME.match(text.strip())
    if not match:
        raise bad("time", f"is {text!r}; valid is hours:minutes:seconds or days-hours, such as '04:00:00' or '1-12'")
    days, *rest = match.groups()
    a, b, c = (None if g is None else int(g) for g in rest)
    if days is not None:
        seconds = int(days) * 86400 + (a or 0) * 3600 + (b or 0) * 60 + (c or 0)
    elif c is not None:
        seconds = (a or 0) * 3600 + (b or 0) * 60 + c
    else:
        seconds = (a or 0) * 60 + (b or 0)
    if seconds <= 0:
        raise bad("time", f"is {text!r}, which is no time at all")
    return -(-seconds // 60)


def time_warning(text: str) -> str | None:
    """What Slurm takes ``24:00`` for, where hours were probably meant; None for any other form."""
    if re.fullmatch(r"\d+:\d+", text.strip()) is None:
        return None
    return f"slurm.time: {text!r} is {parse_time(text)} minutes to Slurm; in hours it is '{text.strip()}:00'"

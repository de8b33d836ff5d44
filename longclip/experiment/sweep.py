"""``sweep:`` as a list of points: which values each of its runs gets.

    sweep:
      grid: {model.context_length: [77, 512], train.seed: [0, 1]}      # every combination
      zip: {train.lr: [3e-4, 1e-3], train.global_batch: [2048, 8192]}  # side by side: two points
      list:                                                            # point by point
        - {model.text.pool: mean, model.text.head: mlp2}
        - {model.text.pool: last, model.text.head: linear}

More than one of them: every combination of their points, here 4 x 2 x 2. A key stands in one of them only.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longclip.errors import ExperimentError, Mistake
from longclip.experiment.explain import Key

FORMS = ("grid", "zip", "list")
VALID = (
    "valid is 'grid: {dotted.key: [value, ...], ...}', 'zip: ...' with lists of one length, "
    "'list: [{dotted.key: value, ...}, ...]'"
)

_SHORT = {"context_length": "ctx", "seed": "s", "lr": "lr", "global_batch": "b", "zero_stage": "zero"}

Point = dict[str, Any]
"""values by dotted key"""


def points(sweep: Any, where: Callable[[Key], str]) -> list[tuple[Point, dict[str, Key]]]:
    """All points of a sweep, each with the place of its values (below ``sweep``); grid varies slowest, its last key
    fastest. ``where`` tells the file and line of a place.

    Raises:
        ExperimentError: with every mistake found.
    """
    if not isinstance(sweep, Mapping) or not sweep or not set(sweep) <= set(FORMS):
        raise ExperimentError([Mistake(where(("sweep",)), "sweep", VALID)])
    mistakes: list[Mistake] = []

    def mistake(key: Key, what: str) -> None:
        mistakes.append(Mistake(where(("sweep", *key)), ".".join(("sweep", *key)), what))

    for form in (f for f in FORMS if f in sweep):
        {"grid": _check_lists, "zip": _check_zip, "list": _check_points}[form](sweep[form], form, mistake)
    if mistakes:
        raise ExperimentError(mistakes)
    parts = [_PARTS[form](sweep[form]) for form in FORMS if form in sweep]
    taken: dict[str, Key] = {}
    for part in parts:
        for key, place in part[0][1].items():
            if key in taken:
                mistake(place, f"{key} is also in sweep.{taken[key][0]}; a key varies in one of them")
            taken.setdefault(key, place)
    if mistakes:
        raise ExperimentError(mistakes)
    found = []
    for chosen in itertools.product(*parts):
        values: Point = {}
        places: dict[str, Key] = {}
        for point, at in chosen:
            values |= point
            places |= at
        found.append((values, places))
    for i, (values, places) in enumerate(found):
        if any(values == before for before, _ in found[:i]):
            said = ", ".join(f"{k} {v}" for k, v in values.items())
            raise ExperimentError([Mistake(where(("sweep", *next(iter(places.values())))), "sweep", f"twice: {said}")])
    return found


def names(found: Sequence[Point], grid: Sequence[str]) -> list[str]:
    """What each point is called: by the keys of ``grid``, and by those others that vary."""
    first = found[0]
    shown = [k for k in first if k in grid or any(point[k] != first[k] for point in found)] or list(first)
    return ["_".join(short_name(k, point[k]) for k in shown) for point in found]


def short_name(key: str, value: Any) -> str:
    """``("train.lr", 0.0003)`` -> ``lr3e-4``: how an axis shows in a run's name."""
    last = key.rpartition(".")[2]
    if isinstance(value, float):
        plain = f"{value:g}"
        exponent = re.sub(r"e([-+])0*(\d+)", lambda m: "e" + m[1].replace("+", "") + m[2], f"{value:e}")
        scientific = re.sub(r"\.?0*e", "e", exponent)
        text = min(plain, scientific, key=len)
    else:
        text = str(value)
    return _SHORT.get(last, last) + re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-")


# ---- the three forms ---------------------------------------------------------------------------------------------

_Mistake = Callable[[Key, str], None]
_Placed = list[tuple[Point, dict[str, Key]]]


def _check_lists(value: Any, form: str, mistake: _Mistake) -> None:
    if not isinstance(value, Mapping) or not value:
        mistake((form,), "is a mapping of dotted keys to lists of values")
        return
    for key, values in value.items():
        if not isinstance(values, list) or not values:
            mistake((form, key), "is a list of at least one value")


def _check_zip(value: Any, form: str, mistake: _Mistake) -> None:
    _check_lists(value, form, mistake)
    if not isinstance(value, Mapping):
        return
    lengths = {key: len(values) for key, values in value.items() if isinstance(values, list) and values}
    first = next(iter(lengths), "")
    for key, length in lengths.items():
        if length != lengths[first]:
            mistake((form, key), f"has {length} values, {first} has {lengths[first]}; lists of a zip are of one length")


def _check_points(value: Any, form: str, mistake: _Mistake) -> None:
    if not isinstance(value, list) or not value:
        mistake((form,), "is a list of points, each a mapping of dotted keys to values")
        return
    for i, point in enumerate(value):
        if not isinstance(point, Mapping) or not point:
            mistake((form, str(i)), "is a mapping of dotted keys to values")
        elif isinstance(value[0], Mapping) and (other := sorted(set(point) ^ set(value[0]))):
            mistake(
                (form, str(i)), f"every point gives the same keys; {', '.join(other)}: not in this one and the first"
            )


def _grid(value: Mapping[str, list[Any]]) -> _Placed:
    places = {key: ("grid", key) for key in value}
    return [(dict(zip(value, chosen, strict=True)), dict(places)) for chosen in itertools.product(*value.values())]


def _zip(value: Mapping[str, list[Any]]) -> _Placed:
    places = {key: ("zip", key) for key in value}
    return [(dict(zip(value, chosen, strict=True)), dict(places)) for chosen in zip(*value.values(), strict=True)]


def _list(value: Sequence[Mapping[str, Any]]) -> _Placed:
    return [(dict(point), {key: ("list", str(i), key) for key in point}) for i, point in enumerate(value)]


_PARTS: dict[str, Callable[[Any], _Placed]] = {"grid": _grid, "zip": _zip, "list": _list}
